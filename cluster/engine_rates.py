"""How fast an engine is, as its last steps show: what admission in front of it reckons with."""

from cluster.engine import StepReport
from cluster.scheduling.rates import Rate


class EngineRates:
    """Fed with the report of every step."""

    def __init__(self) -> None:
        self.prefill = Rate()  # prompt tokens, in steps that compute some
        self.decode = Rate()  # output tokens, in all steps

    def add(self, report: StepReport) -> None:
        if report.num_prefill_tokens:
            self.prefill.add(report.num_prefill_tokens, report.seconds)
        self.decode.add(report.num_sampled, report.seconds)
