"""Tasks for well-known data sets.

A record is as the set's usual JSON Lines files hold it, or has labels by name, as the hub has. Prompts and words are
those of MeZO (Malladi et al., arXiv 2305.17333, its appendix and code) where it has them for models that read from left
to right, and otherwise as said beside the task.
"""

from __future__ import annotations

from zoact_remote.tasks.task import Task

_YES_OR_NO: dict[str | int, str] = {"false": "No", "true": "Yes", "False": "No", "True": "Yes"}

BUILTIN: dict[str, Task] = {
    "sst2": Task("{text} It was", {0: " terrible", 1: " great", "negative": " terrible", "positive": " great"}),
    # Prompt and words of LM-BFF (Gao et al., arXiv 2012.15723), which MeZO takes for its masked models.
    "sst5": Task(
        "{text} It was",
        {0: " terrible", 1: " bad", 2: " okay", 3: " good", 4: " great"}
        | {"very negative": " terrible", "negative": " bad", "neutral": " okay"}
        | {"positive": " good", "very positive": " great"},
    ),
    # As sst5.
    "subj": Task(
        "{text} This is",
        {0: " subjective", 1: " objective", "subjective": " subjective", "objective": " objective"},
    ),
    # After Zhao et al., "Calibrate before use", arXiv 2102.09690; words that common tokenisers keep whole.
    "trec": Task(
        "Question: {text}\nAnswer type:",
        {0: " abbreviation", 1: " entity", 2: " description", 3: " human", 4: " location", 5: " number"}
        | {"ABBR": " abbreviation", "ENTY": " entity", "DESC": " description"}
        | {"HUM": " human", "LOC": " location", "NUM": " number"},
    ),
    # As trec.
    "agnews": Task(
        "Article: {title}. {text}\nTopic:",
        {0: " world", 1: " sports", 2: " business", 3: " technology"}
        | {"World": " world", "Sports": " sports", "Business": " business", "Sci/Tech": " technology"},
    ),
    "rte": Task(
        '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
        {"entailment": "Yes", "not_entailment": "No"},
    ),
    "cb": Task(
        'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
        {"entailment": "Yes", "contradiction": "No", "neutral": "Maybe"},
    ),
    "boolq": Task("{passage} {question:capitalised}?\n", _YES_OR_NO),
    "wic": Task(
        'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n',
        _YES_OR_NO,
    ),
    "copa": Task(
        "{premise:unstopped} {question}",
        {0: " {choice1:uncapitalised}", 1: " {choice2:uncapitalised}"}
        | {"choice1": " {choice1:uncapitalised}", "choice2": " {choice2:uncapitalised}"},
        values={"question": {"cause": "because", "effect": "so"}},
    ),
    # MeZO puts the article's title first, which many copies of the set lack.
    "squad": Task(
        "Context: {context}\nQuestion: {question:stripped}\nAnswer:", completion=" {answers}\n", metric="token_f1"
    ),
    "mawps": Task("Question: {question}\nAnswer:", completion=" {label}\n", metric="number_match", max_tokens=16),
    # The worked solution, whose last line is the answer's number behind "####"; a solution has several lines.
    "gsm8k": Task(
        "Question: {question}\nAnswer:",
        completion=" {answer}\n\n",
        metric="number_match",
        max_tokens=256,
        stop="\n\n",
    ),
    # examples/data/tickets.jsonl, the quickstart's.
    "tickets": Task(
        "Customer: {text}\nThis is about",
        {"billing": " billing", "bug": " bugs", "account": " accounts", "shipping": " shipping"},
    ),
}
"""Tasks for well-known data sets, by name."""
