"""The example of an LLM agent: its answers follow its documents, and its play leaves nothing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_examples import folder, left_behind, playing

from examples.research import agents
from opscore.agentkit import Context, call
from opscore.agentkit.llm import Permissions
from opscore.agentkit.model import Ask, Message, Reply, Request, Result, ToolSpec
from opscore.agentkit.running import Attempt, Means
from opscore.agentkit.steps import InMemory
from opscore.agentkit.tools import ToolFault
from opscore.testing import simulate

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "research"
RESEARCHER = replace(agents.RESEARCHER, mcp_servers=(), permissions=Permissions())
"""It does without its server where that is not started."""
__all__ = ["folder"]


def ask(question: str, means: Means | None = None) -> tuple[Any, InMemory]:
    record = InMemory()
    attempt = Attempt(RESEARCHER, record, means or Means())
    done: Any = call(attempt.as_function, {"goal": question}, Context.for_testing(), 30)
    return done.output, record


def called(record: InMemory) -> list[str]:
    return [one.tool for step in record.steps if isinstance(step, Reply) for one in step.calls]


@pytest.fixture
def documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may change."""
    copy = tmp_path / "documents"
    shutil.copytree(agents.FOLDER, copy)
    monkeypatch.setattr(agents, "FOLDER", copy)
    return copy


@pytest.mark.parametrize(
    ("question", "said", "sources"),
    [
        ("How many books has the library?", "6,200 books", ["library.md"]),
        ("How strong was the strongest gust of wind?", "191 kilometres an hour", ["weather.md"]),
        ("Who decides whether the ferry sails?", "the harbour master", ["harbour.md", "ferry.md"]),
        ("What does a quantum computer weigh?", "The documents do not say.", []),
    ],
)
def test_a_question_is_answered_with_its_sources(
    question: str, said: str, sources: list[str]
) -> None:
    answer, _ = ask(question)
    assert said in answer["answer"] and answer["sources"] == sources


def test_another_document_makes_another_answer_and_another_way(documents: Path) -> None:
    question = "How tall is the lighthouse?"
    (documents / "lighthouse.md").write_text(
        "# The lighthouse\n\nHow tall the lighthouse is [a survey](survey.md) says.\n"
    )
    (documents / "survey.md").write_text("# A survey\n\nThe lighthouse is 47 metres tall.\n")
    answer, record = ask(question)
    assert "47 metres" in answer["answer"] and "survey.md" in answer["sources"]
    read = [
        one.arguments["name"]
        for step in record.steps
        if isinstance(step, Reply)
        for one in step.calls
        if one.tool == "read_document"
    ]
    assert "survey.md" in read
    for path in documents.iterdir():
        path.unlink()
    assert ask(question)[0] == {"answer": "The documents do not say.", "sources": []}


def test_what_was_answered_before_is_answered_from_memory(documents: Path) -> None:
    means = Means()
    first, record = ask("How many books has the library?", means)
    assert called(record)[-2:] == ["remember", "final_answer"]
    again, record = ask("How many books has the library?", means)
    assert again == first and called(record) == ["recall", "search_documents", "final_answer"]
    _, record = ask("How many books has the school?", means)
    assert "read_document" in called(record)


def test_no_tool_leaves_the_folder() -> None:
    for name in ("../agents.py", "/etc/passwd", "none.md", ""):
        with pytest.raises(ToolFault, match="There is no document"):
            agents.read_document(name)


def test_its_workflow_is_played_without_a_stack() -> None:
    given = {"question": "Who runs the bakery?"}
    run = simulate(
        EXAMPLE / "workflows" / "research.yaml",
        input=given,
        agents={"researcher": RESEARCHER},
    )
    assert run.status == "completed", run.error
    assert "Olave and Runa Finch" in run.output["answer"] and "bakery.md" in run.output["sources"]


def test_a_glossary_is_asked_where_the_model_has_one_and_its_words_are_in_the_answer() -> None:
    tools = [ToolSpec("glossary__define", "Define.", {"type": "object"})]
    heard = {
        "recall": {"notes": []},
        "search_documents": [{"name": "ferry.md", "score": 0.9}],
        "read_document": "# The ferry\n\nA crossing costs 14 crowns.\n",
        "glossary__define": {"crown": "Money."},
        "remember": "Remembered.",
    }
    messages: list[Message] = [Ask("What does a crossing cost in crowns?")]
    while True:
        reply = agents.research(Request("", messages, tools))
        assert isinstance(reply, Reply)
        if reply.calls[0].tool == "final_answer":
            break
        messages.append(reply)
        for one in reply.calls:
            told = heard.pop(one.tool)
            content = told if isinstance(told, str) else json.dumps(told)
            messages.append(Result(one.id, one.tool, content))
    assert heard == {}
    assert reply.calls[0].arguments == {
        "answer": "A crossing costs 14 crowns. (crown: Money.)",
        "sources": ["ferry.md"],
    }


def test_a_word_is_defined_where_there_is_a_glossary() -> None:
    from examples.research.server import define

    assert define("It costs two CROWNS.") == {
        "crown": "The money of Skerrow; a crown has 20 groats."
    }
    assert define("nothing of that") == {}


def test_the_server_of_the_glossary_speaks_mcp() -> None:
    import sys

    import anyio
    from mcp import ClientSession, StdioServerParameters
    from mcp.client.stdio import stdio_client

    async def asked() -> Any:
        where = StdioServerParameters(
            command=sys.executable, args=["-m", "examples.research.server"], cwd=ROOT
        )
        async with stdio_client(where) as streams, ClientSession(*streams) as session:
            await session.initialize()
            tools = await session.list_tools()
            return tools, await session.call_tool("define", {"text": "paid in peat"})

    tools, result = anyio.run(asked)
    assert [one.name for one in tools.tools] == ["define"]
    assert json.loads(result.content[0].text) == {
        "peat": "Dried moss, cut from the moor in spring and burnt in winter."
    }


@pytest.mark.timeout(120)
def test_its_play_ends_as_it_must_and_leaves_nothing_behind(folder: Path) -> None:
    with playing(folder, "research/demo.py") as play:
        said, _ = play.communicate()
    assert play.returncode == 0, said
    for words in (
        "→ search_documents(",
        "✔ read_document: # The lighthouse",
        "31 metres",
        "tokens",
    ):
        assert words in said
    assert left_behind(folder) == []
