"""What the pipeline runtime costs: against a loop written by hand, in memory, and in bubbles.

    python -m benchmarks.pipeline_overhead [--quick] [--only overhead-10 memory bubble-1f1b]

On 8 virtual CPU devices.

*Overhead*: 8 stages on one device each, 1F1B, with 10, 100 and 500 parameter arrays per stage, so
small that calling is what costs. Run in turns with `HandWrittenPipeline`. A device's programs run
inside of the call there, so a step takes about as long as all calls. Dispatch is CPU time of the
calling thread, since other threads share the cores. JAX's own part of it is what the same compiled
programs, and `jax.device_put` in place of moves, take when each is called in a loop by itself.

*Memory*: bytes of all live arrays on the devices of each mesh, after every instruction, against
`memory_over_time`.

*Bubble*: see `pipeline_bubble`.

Writes `results/pipeline_overhead.json`, `pipeline_memory.json` and `pipeline_bubble.json`.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from alpa_lite.virtual_devices import configure_virtual_cpu_devices
from benchmarks.options import parse_options
from benchmarks.results_table import Column, ResultsTable, describe_environment

NUM_DEVICES = 8
LEAVES = (10, 100, 500)
ROUNDS = 15
QUICK_ROUNDS = 3
BARE_CALLS = 10


@dataclass(slots=True, eq=False)
class Contender:
    """One way to run the pipeline, and its measurements.

    Attributes:
      run: `run(state, batch) -> (state, loss)`; donates the state.
      state, batch: the state is replaced at every step.
      step_s: measured seconds per step, awaited.
      dispatch_s: CPU seconds of the calling thread per step.
      loss: of the latest step.
    """

    run: Callable[[Any, Any], tuple[Any, Any]]
    state: Any
    batch: Any
    step_s: list[float] = field(default_factory=list)
    dispatch_s: list[float] = field(default_factory=list)
    loss: float = 0.0

    def step(self) -> tuple[float, float]:
        """Run one step; (seconds, CPU seconds of this thread until the call returned)."""
        import jax

        begun, cpu = time.perf_counter(), time.thread_time()
        self.state, loss = self.run(self.state, self.batch)
        cpu = time.thread_time() - cpu
        jax.block_until_ready((self.state, loss))
        seconds = time.perf_counter() - begun
        self.loss = float(loss)
        return seconds, cpu

    def measure(self) -> None:
        """One step to warm up, two that count."""
        self.step()
        for _ in range(2):
            step_s, dispatch_s = self.step()
            self.step_s.append(step_s)
            self.dispatch_s.append(dispatch_s)


def measure_overhead(leaves: int, rounds: int) -> dict[str, Any]:
    """One row of the overhead table."""
    import jax

    import alpa_lite
    from alpa_lite.runtime.timing import time_alone
    from benchmarks.pipeline_model import HandWrittenPipeline, Model

    model = Model(num_stages=NUM_DEVICES, leaves_per_stage=leaves)
    batch = model.batch()
    parallel = alpa_lite.parallelize(model.step, method=model.method(1, "1f1b"))
    executable = parallel.compile(model.init(), batch)
    by_hand = HandWrittenPipeline(model, jax.devices())
    ours = Contender(executable, model.init(), batch)
    theirs = Contender(by_hand.step, by_hand.place(model.init()), batch)
    for _ in range(3):
        ours.step()
        theirs.step()
        if abs(ours.loss - theirs.loss) > 1e-4 * abs(theirs.loss):
            raise AssertionError(f"losses differ: {ours.loss}, by hand {theirs.loss}")
    bare = BareCalls(executable, jax.tree.leaves((ours.state, batch)))
    bare.measure()  # compiles copies
    bare.seconds.clear()
    ours.state = bare.state
    alone_s = []
    order = [ours, theirs]
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            random.Random(0).shuffle(order)
            for each in order:
                each.measure()
            bare.measure()
            (ours.state, _), timed = time_alone(
                executable, jax.tree.leaves((ours.state, ours.batch))
            )
            alone_s.append(sum(t.seconds for t in timed if t.target is None))
    finally:
        gc.enable()
    num = len(executable.program.instructions)
    step_s, by_hand_s = (statistics.median(c.step_s) for c in (ours, theirs))
    dispatch_s = statistics.median(ours.dispatch_s) / num
    own_s = statistics.median(bare.seconds) / num
    return {
        "leaves": leaves,
        "instructions": num,
        "step_ms": 1e3 * step_s,
        "by_hand_ms": 1e3 * by_hand_s,
        "to_by_hand": step_s / by_hand_s,
        "to_alone": step_s / statistics.median(alone_s),
        "dispatch_us": 1e6 * dispatch_s,
        "jax_us": 1e6 * own_s,
        "more_us": 1e6 * (dispatch_s - own_s),
        "by_hand_us": 1e6 * statistics.median(theirs.dispatch_s) / by_hand.num_calls,
    }


class BareCalls:
    """The programs of a pipeline, each called in a loop by itself.

    Stands for JAX's own cost: the same programs with the same arguments, whose results are dropped
    or, where they take the place of donated arguments, used in the next call. Moves are
    `jax.device_put`.

    Attributes:
      state: of the step that was run to get arguments.
      seconds: CPU seconds of this thread for as many calls as a step has, per measurement.
    """

    def __init__(self, executable: Any, leaves: Sequence[Any]) -> None:
        import jax

        from alpa_lite.runtime.pipeline import execute
        from alpa_lite.runtime.timing import kind_of

        self.seconds: list[float] = []
        self._calls: dict[tuple[str, int, int], tuple[int, Callable[[], None]]] = {}
        slots = executable.enter(leaves)
        for each in executable.program.instructions:
            key = kind_of(each), each.mesh, each.target
            if key in self._calls:
                count, call = self._calls[key]
                self._calls[key] = count + 1, call
                execute(each, slots)
                continue
            args = [jax.device_put(slots[s], may_alias=False) for s in each.reads]
            execute(each, slots)
            results = [slots[s] for s in each.writes]
            if each.target != each.mesh:
                call = _device_put(args[0], results[0].sharding)
            else:
                donated = [each.reads.index(s) for s in each.donates]
                call = _chained(each.call, args, donated, results)
            self._calls[key] = 1, call
        self.state, _ = executable.leave(slots)

    def measure(self) -> None:
        """Time every program."""
        total = 0.0
        for count, call in self._calls.values():
            call()
            begun = time.thread_time()
            for _ in range(BARE_CALLS):
                call()
            total += count * (time.thread_time() - begun) / BARE_CALLS
        self.seconds.append(total)


def _device_put(x: Any, sharding: Any) -> Callable[[], None]:
    import jax

    def call() -> None:
        jax.device_put(x, sharding)

    return call


def _chained(
    program: Callable[..., Any], args: list[Any], donated: Sequence[int], results: Sequence[Any]
) -> Callable[[], None]:
    """Calls a program; of its results, as many as it needs replace donated arguments."""
    free = list(range(len(results)))
    replaced = []
    for at in donated:
        kind = args[at].shape, args[at].dtype
        found = next(i for i in free if (results[i].shape, results[i].dtype) == kind)
        free.remove(found)
        replaced.append((at, found))

    def call() -> None:
        made = program(*args)
        for at, found in replaced:
            args[at] = made[found]

    return call


def save(name: str, title: str, columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> None:
    """Write a table."""
    ResultsTable(
        title=title, command="python -m benchmarks.pipeline_overhead",
        environment=describe_environment(f"{NUM_DEVICES} virtual CPU devices"),
        columns=tuple(columns), rows=tuple(rows),
    ).save(name)  # fmt: skip


def main() -> None:
    """Measure, print and save."""
    configure_virtual_cpu_devices(NUM_DEVICES)
    from benchmarks import pipeline_bubble as bubble
    from benchmarks import pipeline_memory as memory

    overheads = {f"overhead-{n}": n for n in LEAVES}
    bubbles = {f"bubble-{schedule}": schedule for schedule in bubble.SCHEDULES}
    options = parse_options(__doc__, [*overheads, "memory", *bubbles])
    tables: dict[str, list[dict[str, Any]]] = {"overhead": [], "memory": [], "bubble": []}
    for name in options.chosen:
        load = os.getloadavg()[0]
        if name in overheads:
            found = [measure_overhead(overheads[name], QUICK_ROUNDS if options.quick else ROUNDS)]
        elif name in bubbles:
            found = bubble.measure_schedule(bubbles[name])
        else:
            found = memory.measure_all()
        print(f"load before {load:.1f}", *found, sep="\n  ", flush=True)
        tables[name.split("-")[0]] += found
    if options.save:
        save("pipeline_overhead", OVERHEAD_TITLE, OVERHEAD_COLUMNS, tables["overhead"])
        save("pipeline_memory", memory.TITLE, memory.COLUMNS, tables["memory"])
        save("pipeline_bubble", bubble.TITLE, bubble.COLUMNS, tables["bubble"])


OVERHEAD_TITLE = (
    f"1F1B over {NUM_DEVICES} stages against a loop of jitted functions written by hand, medians "
    f"of {2 * ROUNDS} steps in turns; microseconds are CPU time of the calling thread"
)
OVERHEAD_COLUMNS = (
    Column("leaves", "Parameters per stage", "d"),
    Column("instructions", "Instructions", "d"),
    Column("step_ms", "Step ms", ".1f"),
    Column("by_hand_ms", "By hand ms", ".1f"),
    Column("to_by_hand", "Step / by hand", ".3f"),
    Column("to_alone", "Step / programs alone", ".2f"),
    Column("dispatch_us", "Instruction us", ".1f"),
    Column("jax_us", "JAX's own us", ".1f"),
    Column("more_us", "Difference us", ".1f"),
    Column("by_hand_us", "By hand, call us", ".1f"),
)

if __name__ == "__main__":
    main()
