"Memory measured from outside of Python's and torch's own accounts."

import json
import os
import subprocess
import sys

PREAMBLE = """
import json, os, sys

out, _before = {}, 0

def _peak():
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

def begin():
    global _before
    try:  # put the mark back to what is in use, where the system lets us
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    except OSError:
        pass
    _before = _peak()
"""


def peak_growth(
    code: str,  # Python; `begin()` in it marks from where the peak counts
    **values,  # set as variables of the code
) -> dict:  # what the code leaves in `out`, and `bytes`
    """Run code in a new process and measure how far the largest resident size of that process grows.

    A process that fails raises `RuntimeError` with its last line.
    """
    variables = "".join(f"{name} = json.loads({json.dumps(x)!r})\n" for name, x in values.items())
    report = "\nout['bytes'] = _peak() - _before\nprint(json.dumps(out))"
    environment = dict(os.environ, TQDM_DISABLE="1")
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back at once, and is not counted
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + variables + code + report],
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the process that measures memory failed: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])
