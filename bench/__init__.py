"""The benchmark: every claim about speed, disk and memory is a row that is measured here.

`python -m bench [--row NAME,NAME]` measures rows, prints a table and writes bench/results.json. Begin with `rows.py`.

A row is one claim: a name, a goal, and a function that measures it. `rows.py` holds the table of all rows. The
functions that measure them are grouped by what they compare:

    student.py            an epoch from a cache: against hard targets, a bare loop and a live teacher
    baselines.py          an epoch from a cache: against the loops of others (DataLoader, torchdistill)
    several_students.py   several students at once: against the same ones one after another
    time_to_accuracy.py   seconds to an accuracy, with stage one included
    teacher.py            stage one: against bare inference, a naive loop and two processes
    engines.py            stage one: against ONNX Runtime and OpenVINO; a compiled teacher in a second process
    read_speed.py         reading rows: against raw reads and other containers
    data_files.py         images inside of larger files: against a folder of them
    busy.py               threads that wait, alone and beside busy processes: against fixed choices
    footprint.py          bytes on disk and in memory

`python -m bench.gpu_check` (`make gpu-check`) has rows of its own, for a GPU: `gpu_check.py` runs the tests marked gpu
and then these rows, which `on_gpu.py` measures.

What they share: `measurement.py` (options and results of a row), `timing.py` (interleaved timing), `other_process.py`
(contenders in a process of their own) and `fixtures.py` (images, teachers and caches that are made up).

How a comparison is timed: its contenders take turns, round by round; a ratio is of two turns of one round, and the
result is the median over the rounds. See `timing.py` for the reason.

To add a row: write a function that takes BenchOptions and returns a Measurement in the module of its kind (a ratio
comes from `timing.time_in_turns`), and add a Row to the table in `rows.py`. Its name becomes a value of --row and a
record of results.json.
"""
