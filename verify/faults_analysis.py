"""Faults in the analyses of a trained model."""

from verify.fault import Fault

_ANALYSIS = ("verify/test_model_analysis.py",)

FAULTS = [
    Fault(
        "profiles/model/subject.py",
        "standard error not divided by the root of the windows",
        "return cls(values_B.mean().item(), spread / len(values_B) ** 0.5)",
        "return cls(values_B.mean().item(), spread)",
        _ANALYSIS,
    ),
    Fault(
        "profiles/model/ranks.py",
        "entropy of the squared singular values",
        "share_S = singular_S.double() / singular_S.double().sum()",
        "share_S = singular_S.double().square() / singular_S.double().square().sum()",
        _ANALYSIS,
    ),
    Fault(
        "profiles/model/heads.py",
        "query heads take the wrong key heads",
        "k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)",
        "k = k.repeat(1, q.shape[1] // k.shape[1], 1, 1)",
        _ANALYSIS,
    ),
    Fault(
        "profiles/model/heads.py",
        "induction looks at the repeated token, not the one after",
        "return p_BHTT.diagonal(1 - half, -2, -1)[..., 1:].mean(dim=(0, -1))",
        "return p_BHTT.diagonal(-half, -2, -1).mean(dim=(0, -1))",
        _ANALYSIS,
    ),
    Fault(
        "profiles/model/losses.py",
        "word starts and continuations swapped",
        'return "word start" if piece.startswith(SPACE_MARK) else "word continuation"',
        'return "word continuation" if piece.startswith(SPACE_MARK) else "word start"',
        _ANALYSIS,
    ),
    Fault(
        "profiles/model/calibration.py",
        "bins not weighted by their guesses",
        "gaps = sum(b.tokens * abs(b.accuracy - b.confidence) for b in self.bins)",
        "gaps = sum(abs(b.accuracy - b.confidence) for b in self.bins)",
        _ANALYSIS,
    ),
    Fault(
        "profiles/model/sensitivity.py",
        "changes are not differences",
        "changes.append(window_nats(subject) - whole_B)",
        "changes.append(window_nats(subject))",
        _ANALYSIS,
    ),
    Fault(
        "profiles/model/allocator.py",
        "an artifact's weights stay in the model",
        "        subject.model.load_state_dict(kept)",
        "        del kept",
        _ANALYSIS,
    ),
]
