"""llama.cpp's HTTP server as the `xllamacpp` package has it, as a program: it listens until a signal ends it."""

from __future__ import annotations

import argparse
import signal


def main() -> None:
    """Serve one GGUF file; the options are those of `llama-server`."""
    parser = argparse.ArgumentParser(prog="python -m kvlatent.serving.xllamacpp_server")
    for option in ("--model", "--alias", "--host"):
        parser.add_argument(option, required=True)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--ctx-size", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    for option in ("--cache-type-k", "--cache-type-v"):
        parser.add_argument(option, default="f16")
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # end at once: destroying a server that has hardly started can hang
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = arguments.model, {arguments.alias}
    params.hostnames = [arguments.host]
    params.n_ctx, params.n_parallel, params.kv_unified = arguments.ctx_size, arguments.parallel, False
    params.cache_ram_mib = 0  # no room for past prompts, which take up to 8 GB otherwise
    params.sampling.seed = arguments.seed
    params.cache_type_k, params.cache_type_v = (
        getattr(xllamacpp.ggml_type, f"GGML_TYPE_{kind.upper()}")
        for kind in (arguments.cache_type_k, arguments.cache_type_v)
    )
    server = xllamacpp.Server(params)
    print(f"listening on {server.listening_address}", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
