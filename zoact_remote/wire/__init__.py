"""What travels between client and server, as frozen dataclasses (JSON under ``/zoact/v1``).

Rows of data are plain mappings, in one of three forms, which have types to declare them by. Text is tokenised on the
server; lists of token ids are accepted in its place, but for a conversation, which goes through the model's chat
template::

    {"prompt": "2 + 2 =", "completion": " 4"}
    {"prompt": "What a film! It was", "choices": [" terrible", " great"], "answer": 1}
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}

The loss of a completion row is the mean negative log-likelihood of the completion's tokens; that of a choices row is
the cross-entropy of the softmax over the choices' summed log-likelihoods; that of a conversation is a completion's, for
the assistant's turn that ends it. All are in nats.
"""

from zoact_remote.wire.answers import (
    AdapterInfo,
    BasisResult,
    Generation,
    Info,
    JournalEntry,
    Limits,
    Losses,
    ProbeLoss,
    RowScore,
    Scores,
    Timing,
    UpdateResult,
)
from zoact_remote.wire.values import (
    Basis,
    Change,
    ChatRow,
    ChoicesRow,
    CompletionRow,
    Json,
    Message,
    Normaliser,
    Probe,
    Rollback,
    Row,
    Side,
    Term,
    Update,
    change_from_json,
)

__all__ = [
    "AdapterInfo",
    "Basis",
    "BasisResult",
    "Change",
    "ChatRow",
    "ChoicesRow",
    "CompletionRow",
    "Generation",
    "Info",
    "JournalEntry",
    "Json",
    "Limits",
    "Losses",
    "Message",
    "Normaliser",
    "Probe",
    "ProbeLoss",
    "Rollback",
    "Row",
    "RowScore",
    "Scores",
    "Side",
    "Term",
    "Timing",
    "Update",
    "UpdateResult",
    "change_from_json",
]
