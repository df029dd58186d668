"""What the server's extension is called, and what it does where nothing else is said.

For the extension, and for the commands that start a server with it: they need no PyTorch to know.
"""

PLUGIN = "zoact"
"""Among vLLM's plug-ins."""
WORKER_EXTENSION = "server_ext.extension.ZoActWorker"
"""For vLLM's ``--worker-extension-cls``."""
SCHEDULER = "server_ext.scheduler.sharing_scheduler"
"""For vLLM's ``--scheduler-cls``."""
STATE_VARIABLE = "ZOACT_STATE"
DEFAULT_STATE = "zoact-state"
"""The directory of the journal."""
KEEP_ALIVE_S = 75
"""Seconds that a connection stays open between calls. Those who pause for longer may send one just as it is closed, and
cannot know whether it arrived: the 5 s that servers have by default are soon over."""
SHARE_VARIABLE = "ZOACT_TRAINING_SHARE"


def default_share(on_cpu: bool) -> float:
    """The most of a step's tokens that training takes while there is other traffic.

    On the CPU a step's time is that of its tokens, and a share costs latency. On a GPU what matters is the weights' way
    through memory, and this one keeps a step within the 512 tokens up to which vLLM has CUDA graphs.
    """
    return 1 / 32 if on_cpu else 1 / 20
