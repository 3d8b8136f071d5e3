"""Measuring: inputs whose results are known, clocks, the limit of the same run, and reports.

To add a suite:

1. ``suites/NAME.py`` has ``measure_NAME(session)``, which `core.session.in_session` calls on every rank. It draws
   inputs (`core.inputs`; `core.sets` where calls take several of them in turns), compares results before it times
   anything (`core.checks`), and times calls in turns: with the clock of the device by `Session.time`, in graphs by
   `Session.replayed`; with the wall clock by `core.wall.wall_times`; models by `core.models.in_turns`. What may fail
   goes through `Session.attempt`: then it failed on every rank, and the rest goes on. Check in one attempt and time in
   the next, or a rank whose results are right begins with the timing alone; `Session.case` does both, and reports the
   call beside the rates of links. Other times go to the report as ``session.send({KIND: {...,
   **session.summaries(...)}})``.
2. ``report/NAME.py`` has ``show(report)``, which yields tables and lines; `report.tables` formats medians with their
   range. `Report.show` calls it. `Report.take` may have a line for each item as it comes, and `Report.draw` a picture.
3. ``cli/bench_phases.py`` runs it as a phase. A new part of the command stands in ``cli/bench.py``, its sizes in
   ``cli/bench_settings.py``.
4. ``tests/cli/test_bench_NAME.py`` runs it on CPU ranks, once with a result that is wrong on one rank only.
"""
