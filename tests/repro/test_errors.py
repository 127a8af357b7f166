"""Bad input becomes one line and an exit code."""

from __future__ import annotations

import errno

import pytest

from repro.errors import Interrupted, UserError, run_main


def leave(main):
    with pytest.raises(SystemExit) as left:
        run_main(main)
    return left.value.code


def raising(error):
    def main():
        raise error

    return main


def test_a_user_error_is_one_line_and_exit_2(capsys):
    assert leave(raising(UserError("first\n  second\tthird"))) == 2
    assert capsys.readouterr().err == "error: first second third\n"


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (1, 1), (True, 0), (False, 0), ("text", 0)])
def test_the_result_of_main_is_the_exit_code_only_when_it_is_a_number(result, code):
    assert leave(lambda: result) == code


def test_ctrl_c_is_130(capsys):
    assert leave(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("number", "word"), [(errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only file system")])
def test_the_system_s_refusal_is_one_line_that_names_the_file(capsys, number, word):
    import os

    assert leave(raising(OSError(number, os.strerror(number), "/some/file"))) == 2
    told = capsys.readouterr().err
    assert word in told and "/some/file" in told and told.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 // 0)


def test_interrupted_leaves_with_128_plus_the_signal():
    assert leave(raising(Interrupted(15))) == 143
