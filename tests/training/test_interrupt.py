import os
import signal
import threading
import time

import pytest

from vitrail.training.interrupt import Abandoned, Interruption, Stopped


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_remembered_and_the_handler_put_back(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with Interruption() as interruption:
        assert interruption.number == 0
        os.kill(os.getpid(), number)
        assert interruption.number == number
        assert signal.getsignal(number) is before  # the second signal acts as ever
    assert signal.getsignal(number) is before
    assert Stopped(number).code == code
    assert Stopped(number).signal == number.name


def interrupt_while_working() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)


def test_work_that_need_not_be_finished_is_abandoned() -> None:
    with Interruption() as interruption:
        with pytest.raises(Abandoned), interruption.at_once():
            interrupt_while_working()
        with pytest.raises(Abandoned), interruption.at_once():  # it came before the work began
            raise AssertionError("not reached")
        with interruption.at_once(False):
            pass


def test_threads_catch_nothing() -> None:
    seen = []

    def work() -> None:
        with Interruption() as interruption:
            seen.append((interruption.number, interruption.previous))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(0, {})]
