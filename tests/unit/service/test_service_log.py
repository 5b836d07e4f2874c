"""Log lines: one JSON object each, whatever is in them."""

import json
import logging

from service.log import JsonFormatter, request_id_of_context


def _line(message: str, **extra: object) -> str:
    record = logging.LogRecord("service.x", logging.INFO, __file__, 1, message, (), None)
    vars(record).update(extra)
    return JsonFormatter().format(record)


def test_a_line_is_one_json_object_with_its_request():
    """Every line names the request it belongs to, and carries what was given as extra."""
    token = request_id_of_context.set("abc")
    try:
        line = json.loads(_line("loaded", model="tiny"))
    finally:
        request_id_of_context.reset(token)
    assert (line["message"], line["model"], line["request_id"], line["level"]) == ("loaded", "tiny", "abc", "info")


def test_nothing_breaks_out_of_its_line():
    """Newlines, terminal colours, lone surrogates and odd objects stay inside one ASCII line."""
    line = _line("a\nb \x1b[31m \ud800", model="x\r\ny", thing=object())
    assert "\n" not in line
    assert "\x1b" not in line
    assert line.isascii()
    assert json.loads(line)["model"] == "x\r\ny"


def test_an_exception_stays_in_its_line():
    """A traceback is a field, not more lines."""
    try:
        int("no")
    except ValueError as error:
        record = logging.LogRecord("x", logging.ERROR, __file__, 1, "m", (), (ValueError, error, error.__traceback__))
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert "ValueError: invalid literal" in json.loads(line)["exception"]
