"""What processes say to each other before they run: same facts, or an error in all of them."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import alpa_lite
from alpa_lite.runtime import agreement
from alpa_lite.runtime.agreement import agreed, plan_facts, plan_once


class Group:
    """One of some processes, which are threads."""

    def __init__(self, me: int, count: int, board: dict[Any, bytes], barrier: Any) -> None:
        self.me, self.count = me, count
        self._board, self._barrier = board, barrier
        self._turns = 0

    def exchange(self, topic: str, data: bytes) -> list[bytes]:
        self._turns += 1
        self._board[self._turns, self.me] = data
        self._barrier.wait(10)
        return [self._board[self._turns, i] for i in range(self.count)]

    def turns(self, topic: str) -> int:
        return self._turns

    def publish(self, topic: str, data: bytes) -> None:
        self._board[topic, self.me] = data
        self._barrier.wait(10)

    def read(self, topic: str, process: int) -> bytes:
        self._barrier.wait(10)
        return self._board[topic, process]


def in_threads(count: int, program: Callable[[Any], Any]) -> list[Any]:
    """What the program returns or raises in each process."""
    board: dict[Any, bytes] = {}
    barrier = threading.Barrier(count)
    found: list[Any] = [None] * count

    def one(me: int) -> None:
        try:
            found[me] = program(Group(me, count, board, barrier))
        except (alpa_lite.AlpaLiteError, OSError) as error:
            found[me] = error

    threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_those_who_agree_go_on():
    found = in_threads(3, lambda g: agreed(g, "counting", lambda: g.me, lambda _: {"a": "1"}))
    assert found == [0, 1, 2]


def test_what_differs_is_named():
    digest = "0123456789" * 6

    def facts(me: int) -> dict[str, str]:
        return {"a": digest if me == 2 else digest[::-1], "b": "2" if me else "1", "c": "same"}

    for error in in_threads(3, lambda g: agreed(g, "counting", lambda: g.me, facts)):
        assert isinstance(error, alpa_lite.PlanError)
        text = str(error)
        assert "counting: the processes have different plans" in text
        assert "process 1 (host" in text and ") differs in b (2, not 1);" in text
        assert ") differs in a, b (2, not 1). " in text and digest not in text


def test_software_is_compared(monkeypatch):
    board: dict[int, str] = {}

    def make(group: Any) -> str:
        board[threading.get_ident()] = f"0.{group.me}"
        return ""

    monkeypatch.setattr(agreement, "versions", lambda: {"jax": board[threading.get_ident()]})
    for error in in_threads(2, lambda g: agreed(g, "x", lambda: make(g), lambda _: {})):
        assert "differs in jax (0.1, not 0.0)" in str(error)


def test_an_error_in_one_is_one_in_all():
    def make(group: Any) -> int:
        if group.me == 1:
            raise OSError("disk full")
        return 0

    first, second = in_threads(2, lambda g: agreed(g, "reading", lambda: make(g), lambda _: {}))
    assert isinstance(second, OSError)
    assert isinstance(first, alpa_lite.PlanError)
    assert str(first).startswith("reading: process 1 (host ")
    assert str(first).endswith("could not do it: OSError: disk full")


def test_different_steps_at_once():
    found = in_threads(2, lambda g: agreed(g, f"step {g.me}", lambda: 0, lambda _: {}))
    for error in found:
        assert "now they are step 0 in process 0, step 1 in process 1" in str(error)


# Plans.


@pytest.fixture(scope="module")
def planned() -> alpa_lite.PipelinePlan:
    def step(w: Any, x: Any) -> Any:
        def loss(w: Any) -> Any:
            return jnp.mean(jnp.tanh(x @ w["a"]) @ w["b"])

        value, grads = alpa_lite.value_and_grad(loss)(w)
        return jax.tree.map(lambda a, b: a - b, w, grads), value

    square = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    parallel = alpa_lite.parallelize(
        step, cluster="cpu:2",
        method=alpa_lite.ThreeDParallel(1, 1, 2, num_microbatches=2, layer_num=2),
    )  # fmt: skip
    return parallel.plan({"a": square, "b": square}, square)


@dataclasses.dataclass
class Made:
    plan: alpa_lite.PipelinePlan
    where: str


def test_process_0_plans(planned):
    def program(group: Any) -> Made:
        return plan_once(
            group, lambda: Made(planned, "searched"), lambda plan: Made(plan, "rebuilt")
        )

    found = in_threads(3, program)
    assert [x.where for x in found] == ["searched", "rebuilt", "rebuilt"]
    assert all(x.plan == planned for x in found)


@pytest.mark.parametrize(
    ("error", "theirs"),
    [
        (alpa_lite.InfeasibleError("too large"), alpa_lite.InfeasibleError),
        (alpa_lite.PlanError("odd"), alpa_lite.PlanError),
        (OSError("disk full"), alpa_lite.PlanError),
    ],
)
def test_process_0_cannot_plan(error, theirs):
    def search() -> Any:
        raise error

    first, second = in_threads(2, lambda g: plan_once(g, search, lambda plan: None))
    assert first is error
    assert type(second) is theirs
    assert str(second) == f"process 0 could not plan: {type(error).__name__}: {error}"


def test_facts_of_plans_leave_timings_out(planned):
    facts = plan_facts(planned)

    def slow(stage: Any) -> Any:
        report = dataclasses.replace(stage.plan.solve, wall_s=1e3)
        return dataclasses.replace(stage, plan=dataclasses.replace(stage.plan, solve=report))

    slower = dataclasses.replace(planned, wall_s=1e3, stages=tuple(map(slow, planned.stages)))
    assert slower.to_json() != planned.to_json()
    assert plan_facts(slower) == facts
    other = dataclasses.replace(planned, schedule="gpipe")
    assert {k for k, v in plan_facts(other).items() if v != facts[k]} == {"schedule of the plan"}
