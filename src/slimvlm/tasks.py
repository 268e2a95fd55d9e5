"""Find tasks by name."""

from __future__ import annotations

from slimvlm.errors import ConfigError
from slimvlm.samples import Task


def builtin_tasks() -> dict[str, Task]:
    """All tasks that work without a network, by name."""
    from slimvlm.demo.tasks import TASKS

    return dict(TASKS)


def find_tasks(names: str) -> list[Task]:
    """Tasks from a comma-separated list; ``demo`` stands for all built-in ones.

    Raises:
        ConfigError: If a name is not known.
    """
    known = builtin_tasks()
    chosen: dict[str, Task] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name != "demo" and name not in known:
            raise ConfigError(f"task {name!r} is not known. Choose from: demo, {', '.join(known)}")
        chosen.update(known if name == "demo" else {name: known[name]})
    if not chosen:
        raise ConfigError(f"tasks {names!r} names no task")
    return list(chosen.values())
