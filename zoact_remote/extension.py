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
SHARE_VARIABLE = "ZOACT_TRAINING_SHARE"
DEFAULT_SHARE = 1 / 32
"""The most of a step's tokens that training takes while there is other traffic."""
