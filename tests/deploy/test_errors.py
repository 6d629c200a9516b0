from __future__ import annotations

import pytest

from deploy.errors import DataError, command


@command
def _main(argv=None):
    raise DataError("image 'a\x1b]0;title\x07\x9b31m\r\u202eb': é, 名\nsecond line")


def test_a_message_is_never_obeyed_by_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main() == 2
    assert capsys.readouterr().err == "error: image 'a\\x1b]0;title\\x07\\x9b31m\\r\\u202eb': é, 名\nsecond line\n"
