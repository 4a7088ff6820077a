"""Every fault the checks must notice, by area."""

from verify import (
    faults_analysis,
    faults_bench,
    faults_eval,
    faults_model,
    faults_optim,
    faults_quant,
    faults_submission,
    faults_tools,
)
from verify.fault import Fault

FAULTS: list[Fault] = [
    *faults_model.FAULTS,
    *faults_optim.FAULTS,
    *faults_quant.FAULTS,
    *faults_eval.FAULTS,
    *faults_submission.FAULTS,
    *faults_bench.FAULTS,
    *faults_tools.FAULTS,
    *faults_analysis.FAULTS,
]
