"""Many clients at once on a served model: what they got, and the engine's memory over time.

    python benchmarks/serve_load.py STUDENT --streams 64 --minutes 10

Starts `kvlatent serve`, streams completions of random length until the time is over, one in eight of them longer than
the context, then stops the server. Prints a line every ten seconds, and at the end the counts and the memory of the
server, its engine included, at the start, in the middle, at the end and at most; exit code 1 if a stream was cut off.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path


def stream(port: int, context: int, rng: random.Random) -> str:
    """Ask for one completion; returns whole, refused or what went wrong."""
    prompt = rng.randrange(1, 2 * context if rng.random() < 1 / 8 else context // 2)
    body = {"prompt": "x" * prompt, "max_tokens": rng.randrange(1, context // 2), "stream": True, "ignore_eos": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        lines = [line for line in response.read().split(b"\n") if line.startswith((b"data:", b"error:"))]
    except (OSError, http.client.HTTPException) as error:
        return f"broken: {type(error).__name__}"
    finally:
        connection.close()
    if response.status != 200:
        return f"refused with {response.status}"
    if lines and lines[-1] == b"data: [DONE]" and not any(b'"error"' in line for line in lines):
        return "whole"
    return f"cut off: {lines[-1][:80]!r}" if lines else "cut off: nothing"


def resident(process: int) -> int:
    """MB that a process and its children have in memory."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except OSError:  # it ended
            continue
        if process in (int(fields["Pid"]), int(fields["PPid"])) and "VmRSS" in fields:
            total += int(fields["VmRSS"].split()[0])
    return total // 1024


def main() -> int:
    """Serve, load, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--port", type=int, default=8123)
    args = parser.parse_args()
    command = [sys.executable, "-m", "kvlatent", "serve", args.model, "--engine", "llama.cpp", "--port", str(args.port)]
    server = subprocess.Popen([*command, "--context", str(args.context)], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    for line in server.stderr:
        if "is served by" in line:
            break
    threading.Thread(target=server.stderr.read, daemon=True).start()
    counts: Counter[str] = Counter()
    end = time.monotonic() + 60 * args.minutes

    def client(seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < end:
            counts[stream(args.port, args.context, rng)] += 1

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(args.streams)]
    for thread in clients:
        thread.start()
    began, sizes = time.monotonic(), []
    while any(thread.is_alive() for thread in clients):
        sizes.append(resident(server.pid))
        print(f"{time.monotonic() - began:5.0f} s  {sizes[-1]:6} MB  {dict(counts)}", flush=True)
        time.sleep(10)
    server.terminate()
    memory = {"start": sizes[0], "middle": sizes[len(sizes) // 2], "end": sizes[-1], "most": max(sizes)}
    about = {"streams": args.streams, "minutes": args.minutes, "counts": counts, "MB": memory}
    print(json.dumps(about | {"exit": server.wait()}))
    return int(any(not kind.startswith(("whole", "refused")) for kind in counts))


if __name__ == "__main__":
    sys.exit(main())
