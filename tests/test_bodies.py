"""Bodies of requests: what is refused before an engine reads it, with the reason, and what passes."""

import json
from typing import Any

import pytest

from kvlatent.errors import UserError
from kvlatent.serving import bodies
from kvlatent.serving.bodies import DEEPEST, MOST_MESSAGES, MOST_NAMES, MOST_REPEATS, MOST_SEARCHED, MOST_VALUES, Served

CHAT = "/v1/chat/completions"
SERVED = Served(context=131072, vocabulary=320, special=("", "<eos>", "<|im_start|>", "[INST]"))


def check_body(path: str, body: bytes) -> None:
    bodies.check_body(path, body, SERVED)


def nested(levels: int) -> bytes:
    """A request with lists so deep within each other, itself the first level."""
    return b'{"extra":%s1%s}' % (b"[" * (levels - 1), b"]" * (levels - 1))


def schema(**fields: Any) -> bytes:
    """A request for an answer by a schema."""
    wanted = {"type": "object", "properties": {"x": {"type": "string", **fields}}}
    return json.dumps({"response_format": {"type": "json_schema", "json_schema": {"schema": wanted}}}).encode()


def chat(messages: Any, **others: Any) -> bytes:
    return json.dumps({"messages": messages, **others}).encode()


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "the body is no JSON: Expecting value: line 1 column 1"),
        (b"{", "the body is no JSON: Expecting property name"),
        (b"[]", "the body is a JSON object"),
        (b'{"prompt":"\xff"}', "the body is no JSON: 'utf-8' codec can't decode"),
        (b'{"temperature":NaN}', "the body is no JSON: NaN is no number"),
        (b'{"seed":%s}' % (b"1" * 5000), "the body is no JSON: Exceeds the limit"),
        (b'{"prompt":"a","prompt":"b"}', "the body is no JSON: an object has a name twice"),
        (b'{"prompt":%s' % (b"[" * 2_000_000), f"nested more than {DEEPEST} levels deep"),
        (nested(100_000), f"nested more than {DEEPEST} levels deep"),
        (nested(DEEPEST + 1), f"nested more than {DEEPEST} levels deep"),
        (b'{"prompt":[%s0]}' % (b"[]," * MOST_VALUES), f"holds more than {MOST_VALUES} lists, objects and texts"),
        (b'{"stop":[%s0]}' % (b'"a",' * MOST_VALUES), f"holds more than {MOST_VALUES} lists, objects and texts"),
        (
            json.dumps({"json_schema": dict.fromkeys(map(str, range(MOST_NAMES + 1)))}).encode(),
            "an object of more than",
        ),
        (b'{"prompt":"a","grammar":"root ::= \\"a\\""}', "grammar is not supported; response_format takes"),
        (schema(pattern="((a{0,50}){0,50}){0,50}"), f"a schema's pattern repeats something more than {MOST_REPEATS}"),
        (schema(pattern="a{1,99999}"), f"a schema's pattern repeats something more than {MOST_REPEATS}"),
        (schema(enum=["a"] * (MOST_NAMES + 1)), f"a schema has an enum of more than {MOST_NAMES} values"),
        (schema(maxItems=1e9), f"a schema's maxItems is beyond {MOST_REPEATS}"),
        (b'{"tokens":[1,1000000000]}', "1000000000 is no token; ids go from 0 to 319"),
        (b'{"content":["a",320]}', "320 is no token"),
        (b'{"prompt":[[1],[-1]]}', "-1 is no token"),
        (b'{"input":[1.5]}', "1.5 is no token"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/completion"])
def test_what_harms_an_engine_is_refused(path: str, body: bytes, why: str) -> None:
    with pytest.raises(UserError, match=f"^[^\n]*{why}"):
        check_body(path, body)


TEXT = {"type": "text", "text": "a"}


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        (None, "messages: Input should be a valid list; got 'None'"),
        ("hi", "messages: Input should be a valid list; got 'hi'"),
        ([], "messages: List should have at least 1 item"),
        ([[]], "messages.0: Input should be a valid dictionary"),
        ([{"content": "hi"}], "messages.0.role: Field required"),
        ([{"role": 3, "content": "hi"}], "messages.0.role: Input should be a valid string; got '3'"),
        ([{"role": "user", "content": 3}], "messages.0.content: Input should be a valid list; got '3'"),
        ([{"role": "user", "content": [{**TEXT, "text": 3}]}], "messages.0.content: Input should be a valid string"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content: Input should be 'text'; got"),
        ([{"role": "user", "content": [TEXT] * (MOST_MESSAGES + 1)}], "messages.0.content: List should have at most"),
        ([{"role": "user", "content": "a"}] * (MOST_MESSAGES + 1), "messages: List should have at most"),
    ],
)
def test_chats_are_text_by_somebody(messages: Any, why: str) -> None:
    with pytest.raises(UserError, match=f"^{why}[^\n]*$"):
        check_body(f"{CHAT}?x=1", chat(messages))
    check_body("/v1/messages", chat(messages))  # another form, which the engine checks


def test_special_tokens_are_bounded_by_the_size_of_the_body() -> None:
    def text(count: int, size: int = 2**20) -> bytes:
        marked = "".join(SERVED.special[1 + number % 3] for number in range(count))
        return json.dumps({"prompt": [marked, "<" * (size - len(marked) - 20)]}).encode().ljust(size)

    check_body("/tokenize", text(MOST_SEARCHED // 2**20))
    with pytest.raises(UserError, match="at most 1024 special tokens"):
        check_body("/tokenize", text(MOST_SEARCHED // 2**20 + 1))
    check_body("/tokenize", text(2000, 2**16))
    message = {"role": "user", "content": "a" * 600}
    check_body(CHAT, chat([message] * 900))
    with pytest.raises(UserError, match="special tokens, 2 of them for each message"):
        check_body(CHAT, chat([message] * 1000))


@pytest.mark.parametrize("path", ["/apply-template", "/api/chat"])
def test_other_paths_of_chats_take_the_same(path: str) -> None:
    with pytest.raises(UserError, match=r"messages\.0\.role: Input should be a valid string"):
        check_body(path, chat([{"role": 3, "content": "hi"}]))


def test_ordinary_requests_pass() -> None:
    check_body("/v1/completions", schema(pattern="^[a-z]{2,40}(-[0-9]{1,4})?$", enum=["a", "b"], maxLength=200))
    check_body("/v1/completions", b'{"prompt":[%s0]}' % (b"0," * 200_000))
    check_body("/v1/completions", nested(DEEPEST))
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": "s", "name": "n"},
        {"role": "user", "content": [TEXT, TEXT]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
    ]
    check_body(CHAT, chat(messages, tools=[tool], temperature=0.5, stop=["a"], stream=True))
