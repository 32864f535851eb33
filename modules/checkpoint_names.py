"""Whether a checkpoint is of the configuration that is to load it."""

from collections.abc import Iterable


def misfit(wanted: Iterable[str], saved: Iterable[str]) -> str:
    """What to say of a checkpoint with tensors of other names than those that are trained.

    Args:
        wanted: the names of all that is trained.
        saved: those in the checkpoint.
    """
    missing, extra = sorted(set(wanted) - set(saved)), sorted(set(saved) - set(wanted))
    return (
        f"the checkpoint does not fit this configuration: {len(missing)} trained tensors are missing "
        f"({', '.join(missing[:3])}), {len(extra)} are unknown ({', '.join(extra[:3])}). Use the config.yaml "
        f"that lies beside the checkpoint."
    )
