"""Evaluation during training."""

from pathlib import Path
from typing import Dict, Optional

from ..io import read_json, write_json
from ..task import Task
from .components import Components, default_metrics
from .evaluation import EvaluationJob, evaluate
from .log import RunLog
from .processes import Processes
from .settings import EvaluationSettings


class EvaluationHook:
    """Evaluates a model and keeps the scores in the run folder as ``evaluation_iter_N.json``.

    Args:
        components, task: make the evaluator.
        dataset: to evaluate on.
        settings: which metrics.
        processes, log: of the run.
        workers: data-loading processes.
        amp: precision of the forward pass.
    """

    def __init__(
        self,
        components: Components,
        task: Task,
        dataset,
        settings: EvaluationSettings,
        processes: Processes,
        log: RunLog,
        workers: int,
        amp: Optional[str],
    ):
        self.components, self.task, self.dataset = components, task, dataset
        self.processes, self.log, self.workers, self.amp = processes, log, workers, amp
        self.evaluator = components.build_evaluator(
            task, metrics=settings.metrics or default_metrics(task), device=processes.device
        )

    def __call__(self, model, iteration: int, folder: Path) -> Optional[Dict[str, float]]:
        """Scores of the model in the main process, None in the others.

        A continued run finds the scores that it has already written into its folder.
        """
        path = folder / ('evaluation_iter_%d.json' % iteration)
        if self.processes.broadcast(path.exists()):
            return _totals(read_json(path)) if self.processes.is_main else None
        result = evaluate(
            EvaluationJob(
                model,
                self.dataset,
                self.components.collate,
                self.evaluator,
                self.task,
                self.processes,
                self.log.say,
                self.workers,
                self.amp,
            )
        )
        if result is None:
            return None
        for line in result.as_table().splitlines():
            self.log.say(line)
        scores = result.as_dict()
        write_json(path, dict(scores, iteration=iteration))
        return _totals(scores)


def _totals(scores) -> Dict[str, float]:
    return {name: value for name, value in scores.items() if isinstance(value, float)}
