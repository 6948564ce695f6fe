"""What a sweeper that optimises would find, where its objective and what it varies go together."""

from collections.abc import Sequence

_SPARSITY = ("importance_minimality", "smooth_l0")


def degenerate(objective: str, searched: Sequence[str]) -> str | None:
    """What to say where the searched keys are weights of what the objective measures; None: nothing.

    A coefficient of the loss is part of `loss/total`, so the best one is the least. L0 and alive
    subcomponents are least where the coefficient of sparsity kills all.

    Args:
        objective: name of the metric.
        searched: keys that the sweeper chooses.
    """
    weights = [key for key in searched if key.startswith("loss.") and key.endswith(".coeff")]
    if objective.startswith(("l0/", "l0_group/", "alive/", "alive_group/")):
        weights = [key for key in weights if key.split(".")[-2] in _SPARSITY]
        reason = "which is best where everything is dead"
    elif objective == "loss/total":
        reason = "which is the sum of terms times these very coefficients"
    else:
        return None
    if not weights:
        return None
    return (
        f"objective: {objective}, {reason}, says nothing about {' or '.join(weights)}; search over train.lr, "
        "or choose an objective that does not contain the coefficient, such as objective=recovery/mmcs of a "
        "toy, to be maximised"
    )
