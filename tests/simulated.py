"Simulated records of single test examples, as runs write them."

import numpy as np
import pandas as pd


def records(run, right, task="piqa", kind="", group=None, seed=1, sure=None):  # right (n,)
    "One world's records; `group` is a number per example, one group each where it is None."
    right = np.asarray(right, bool)
    index = np.arange(len(right))
    label = index % 2
    frame = pd.DataFrame(dict(run=run, seed=seed, task=task, id=[f"{task}{k}" for k in index]))
    frame["group"] = [f"g{k}" for k in (index if group is None else group)]
    frame = frame.assign(kind=kind, label=label, prediction=np.where(right, label, 1 - label), right=right)
    return frame if sure is None else frame.assign(sure=sure)


def worlds(run, accuracy, n=200, n_worlds=5, seed=0, **more):
    "Records of several worlds with random answers; the draws depend on the run's name."
    generator = np.random.default_rng([seed, *map(ord, run)])
    frames = [records(run, generator.random(n) < accuracy, seed=s, **more) for s in range(1, n_worlds + 1)]
    return pd.concat(frames, ignore_index=True)
