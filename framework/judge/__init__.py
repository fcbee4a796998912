"""What a command is told before torch is loaded: every fault of a configuration.

Faults are found in the words that made it, in its values, and in the small files that it names.
"""

from framework.judge.verdict import Verdict, judge_points, judge_run

__all__ = ["Verdict", "judge_points", "judge_run"]
