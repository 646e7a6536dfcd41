"""Work side by side, in an order in which each has what it waits for."""

import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch

from genstream.cli.pipeline import quiet_loading

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A call that waits for others: `function(*arguments)` once all of `after` are done."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    after: tuple[str, ...] = ()


def do_all(jobs: Sequence[Job], at_once: int) -> dict[str, Any]:
    """Do all jobs, up to `at_once` of them side by side on as many processes; what each returned, by name.

    Models this small gain little from a second thread: two jobs on two cores get 1.4 times as much done as
    one after the other.

    Raises:
        RuntimeError: jobs failed; each was told at once, and all that does not wait for one of them is done.
            One at a time, the first failure ends them all, and is raised itself.
    """
    if at_once == 1:
        return {job.name: _quietly(job, None) for job in jobs}
    done, failed = dict[str, Any](), list[str]()
    waiting, running = list(jobs), dict[Future[Any], str]()
    # Processes of their own, started anew: one that was forked would share torch's threads.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(at_once, mp_context=spawn, initializer=_end_with_parent) as pool:
        while True:
            ready = [job for job in waiting if done.keys() >= set(job.after)][: at_once - len(running)]
            if not ready and not running:
                break
            threads = (os.cpu_count() or 1) // max(1, len(ready) + len(running))
            for job in ready:
                waiting.remove(job)
                running[pool.submit(_quietly, job, max(1, threads))] = job.name
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                name = running.pop(future)
                if (error := future.exception()) is None:
                    done[name] = future.result()
                else:
                    logger.error("%s failed", name, exc_info=error)
                    failed.append(name)
    if failed:
        left = (
            f"; not begun, as they wait for it: {', '.join(job.name for job in waiting)}" if waiting else ""
        )
        raise RuntimeError(f"failed: {', '.join(failed)}{left}")
    return done


def _end_with_parent() -> None:
    """Let this process end as soon as its parent has, which a kill leaves no time to tell it.

    It would go on with its job, keep others from the job's folder, and then wait for ever for the next one.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)  # the job is in another thread, which no exception would reach

    threading.Thread(target=follow, daemon=True).start()


def _quietly(job: Job, threads: int | None) -> object:
    """Do a job in this process, telling its name with all it says."""
    if threads is not None:
        torch.set_num_threads(threads)
    quiet_loading()
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s  {job.name}  %(message)s", datefmt="%H:%M:%S", force=True
    )
    logging.info("begins")
    return job.function(*job.arguments)
