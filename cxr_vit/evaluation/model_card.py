"""The report of a scored split as a Markdown model card, with metadata that the hub reads."""

from __future__ import annotations

import re
from typing import Any, Iterator, List, Mapping, Optional, Sequence

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from cxr_vit.evaluation import statements
from cxr_vit.evaluation.page import PageContext, origin_facts
from cxr_vit.web_page import printable

#: Characters that mean something to Markdown, or to the HTML in it.
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#+!|~&$:@])")
_DATA = "chest X-rays"


def model_card(metrics: Mapping[str, Any], context: PageContext) -> str:
    """Return a model card, given the content of metrics.json.

    The metadata have the macro AUROC and average precision and those of each finding, where they
    are defined, as `EvalResult`. No image and no patient is named. Nothing asks the hub.
    """
    data = ModelCardData(
        model_name=printable(context.title),
        language="en",
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["chest-x-ray", "medical", "research-only"],
        eval_results=list(_results(metrics)),
    )
    body = "\n".join(_body(metrics, context))
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


def _results(metrics: Mapping[str, Any]) -> Iterator[EvalResult]:
    """Yield the scores that are defined, the means first."""
    named = {"macro": metrics["means"]["macro"], **metrics["findings"]}
    for score, words in (("auroc", "AUROC"), ("average_precision", "average precision")):
        for name, each in named.items():
            statistic = each[score]
            if statistic is not None:
                yield EvalResult(
                    task_type="image-classification",
                    task_name="multi-label classification",
                    dataset_type=_DATA,
                    dataset_name=_DATA,
                    dataset_split=metrics["split"],
                    metric_type="roc_auc" if score == "auroc" else score,
                    metric_name=f"{words}, {printable(name)}",
                    metric_value=statistic["value"],
                )


def _body(metrics: Mapping[str, Any], context: PageContext) -> Iterator[str]:
    """Yield the lines of the text."""
    yield f"# {_escaped(context.title)}"
    yield from ("", f"**{_escaped(metrics['notice'])}**", "", "## Intended use", "")
    yield (
        "Research on the classification of chest X-rays: comparison of models, of training methods"
        " and of data sets."
    )
    yield "Not intended: diagnosis, triage, or any other use on patients."
    for answer in statements.answers(metrics):
        yield from ("", f"## {answer.question}", "")
        yield from (f"- {_sentence(sentence)}" for sentence in answer.sentences)
    yield from ("", "## Scores", "")
    yield from _scores_table(metrics)
    yield from ("", "## Model and data", "")
    facts = [*origin_facts(metrics), *context.versions.items()]
    yield from _table(["", ""], [[key, text] for key, text in facts])
    if context.config_text:
        yield from ("", "## Configuration", "")
        yield from _code(context.config_text)
    yield from ("", "## Limits", "")
    yield from (f"- {limit}" for limit in statements.LIMITS)
    yield from ("", f"**{_escaped(metrics['notice'])}**")


def _scores_table(metrics: Mapping[str, Any]) -> Iterator[str]:
    level = f"{100 * metrics['intervals']['level']:.0f} %"
    header = ["finding", "positives", "negatives", "prevalence"]
    header += [f"AUROC ({level} interval)", f"average precision ({level} interval)"]
    rows = [
        [
            name,
            f"{each['positives']:,}",
            f"{each['negatives']:,}",
            statements.number(each["prevalence"]),
            *_scores(each),
        ]
        for name, each in metrics["findings"].items()
    ]
    for mean, each in metrics["means"].items():
        rows.append([f"{statements.MEAN_WORDS[mean]} ({mean})", "", "", "", *_scores(each)])
    return _table(header, rows)


def _scores(each: Mapping[str, Any]) -> List[str]:
    return [statements.with_interval(each[score]) for score in ("auroc", "average_precision")]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    yield from (f"| {' | '.join(map(_escaped, row))} |" for row in rows)


def _sentence(sentence: statements.Sentence) -> str:
    return "".join(
        _escaped(part) if isinstance(part, statements.Name) else part for part in sentence
    )


def _code(text: str) -> Iterator[str]:
    """Yield a block of code; its fence is longer than any in the text."""
    longest: int = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    yield f"{fence}yaml"
    yield from map(printable, text.splitlines())
    yield fence


def _escaped(text: Optional[str]) -> str:
    """Return a text of one line that Markdown shows as it is."""
    return _SPECIAL.sub(r"\\\1", printable(text or ""))
