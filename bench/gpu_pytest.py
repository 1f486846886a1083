"""Serves as a pytest plugin for the stages of bench/gpu.py: GPU_TESTS chooses a backend's tests,
and every test that ran is counted as it ends.
"""

import os

import pytest

from .gpu_runner import answer

# a reason that lets a test be skipped and still count
EXCUSED = "the GPU has too little memory"


class Count:
    """Counts what became of the tests so far; with pytest-xdist, in the process that hands them
    out.
    """

    def __init__(self) -> None:
        self.said: dict = {"passed": 0, "failed": [], "excused": 0, "skipped": []}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.said["failed"] += [report.nodeid] * (report.nodeid not in self.said["failed"])
        elif report.skipped:
            reason = str(
                report.longrepr[2]
                if isinstance(report.longrepr, (tuple, list))
                else report.longrepr
            )
            excused = EXCUSED in reason
            self.said["excused"] += excused
            self.said["skipped"] += (
                [] if excused else [f"{report.nodeid.split('::')[-1]} ({reason[:150]})"]
            )
        elif report.when == "call":
            self.said["passed"] += 1
        # of a worker that crashed nothing else comes
        if report.failed or report.when == "teardown":
            answer(self.said)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput") and not config.option.collectonly:
        config.pluginmanager.register(Count())


def kernels(item: pytest.Item) -> str:
    return item.callspec.params.get("kernels", "triton") if hasattr(item, "callspec") else "triton"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Lets tests that name no backend go with Triton's. What others leave out after this is missed:
    it was expected.
    """
    backend = os.environ["GPU_TESTS"]
    wanted = [item for item in items if kernels(item) == backend]
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = wanted
    answer({"expected": len(wanted)})


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly:
        answer({"collected": len(session.items)})
