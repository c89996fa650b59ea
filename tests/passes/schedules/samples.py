"""Schedules to test with, written short, and a slow simulator written another way."""

import itertools

from hypothesis import strategies as st

from alpa_lite.passes.schedules import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    SCHEDULES,
    Schedule,
    Task,
    TaskTimes,
    Timeline,
    dependencies,
    make_schedule,
    transfers,
)

LETTERS = {"F": FORWARD, "B": BACKWARD, "I": BACKWARD_INPUT, "W": BACKWARD_WEIGHT}
EVEN = ("chimera", "dualpipe")


def task(text: str) -> Task:
    """`3F12`: forward of stage 3 on microbatch 12."""
    letter = next(each for each in text if each.isalpha())
    stage, microbatch = text.split(letter)
    return Task(LETTERS[letter], int(stage), int(microbatch))


def tasks(rows: str) -> tuple[tuple[Task, ...], ...]:
    """A row per mesh; points are idle slots."""
    return tuple(
        tuple(task(cell) for cell in row.split() if cell != ".") for row in rows.strip().split("\n")
    )


def straight_schedule(rows: str, name: str = "custom") -> Schedule:
    """One stage per mesh, one pipeline."""
    lists = tasks(rows)
    microbatches = 1 + max(each.microbatch for row in lists for each in row)
    return Schedule(name, (tuple(range(len(lists))),), (0,) * microbatches, lists)


@st.composite
def schedules(draw, names=tuple(SCHEDULES), max_meshes=16, max_microbatches=64, max_virtual=4):
    name = draw(st.sampled_from(names))
    step = 2 if name in EVEN else 1
    meshes = step * draw(st.integers(1, max_meshes // step))
    microbatches = step * draw(st.integers(1, max_microbatches // step))
    virtual = draw(st.integers(1, max_virtual)) if SCHEDULES[name].num_virtual is None else None
    return make_schedule(name, meshes, microbatches, virtual)


@st.composite
def times_for(draw, schedule, largest=4):
    """Whole numbers, so that sums are exact in any order."""
    seconds = st.integers(0, largest).map(float)

    def per(length):
        return tuple(draw(st.lists(seconds, min_size=length, max_size=length)))

    stages = schedule.num_stages
    return TaskTimes(
        forward_s=per(stages),
        backward_s=per(stages),
        backward_input_s=per(stages),
        backward_weight_s=per(stages),
        forward_transfer_s=per(stages - 1),
        backward_transfer_s=per(stages - 1),
        tail_s=per(schedule.num_meshes),
    )


def naive_times(schedule: Schedule, times: TaskTimes, overlap: bool):
    """Start, end, and start and end of the transfer per task: raised until nothing changes."""
    needs, sent = dependencies(schedule), transfers(schedule)
    start = {each: 0.0 for row in schedule.tasks for each in row}
    send = dict(start)

    def end(each):
        return start[each] + times.of_kind(each.kind)[each.stage]

    def arrival(each):
        if each not in sent:
            return end(each)
        if each.kind == FORWARD:
            return send[each] + times.forward_transfer_s[each.stage]
        return send[each] + times.backward_transfer_s[each.stage - 1]

    changed = True
    while changed:
        changed = False
        for row in schedule.tasks:
            link_before = {}
            for before, each in itertools.pairwise((None, *row)):
                bounds = [
                    arrival(need) if need in sent and sent[need].consumer == each else end(need)
                    for need in needs[each]
                ]
                if before is not None:
                    bounds.append(end(before) if overlap else arrival(before))
                new_start = max([0.0, *bounds])
                changed |= new_start != start[each]
                start[each] = new_start
                new_send = end(each)
                if each in sent:
                    target = sent[each].target
                    if target in link_before:
                        new_send = max(new_send, arrival(link_before[target]))
                    link_before[target] = each
                changed |= new_send != send[each]
                send[each] = new_send
    return {each: (start[each], end(each), send[each], arrival(each)) for each in start}


def by_task(timeline: Timeline):
    """The same of a timeline."""
    return {
        each: times
        for row in zip(
            timeline.schedule.tasks,
            timeline.start_s,
            timeline.end_s,
            timeline.send_start_s,
            timeline.send_end_s,
            strict=True,
        )
        for each, *times in zip(*row, strict=True)
    }
