"""Every fault the checks must notice, by area."""

from verify import faults_model
from verify.fault import Fault

FAULTS: list[Fault] = [*faults_model.FAULTS]
