"""A LangGraph agent that goes back two steps and takes another branch, without computing a token twice.

Run a server first (`kvdb-server`), then `python examples/langgraph_agent.py [kvdb://host:port]`. Each step of the
graph writes one paragraph with dsv4-nano. Every graph checkpoint owns the model's state at that point: going back in
the graph is a RESTORE, and only the paragraphs of the new branch are computed.
"""

from __future__ import annotations

import operator
import sys
from typing import Annotated, Any, TypedDict

from langchain_core.runnables import RunnableConfig
from langgraph.graph import END, START, StateGraph

import kvdb
from kvdb.langgraph import KVDBSaver

OPENING = "The lighthouse keeper climbed the stairs, lit the lamp, and wrote in his book:"
STEPS = 4


class Story(TypedDict):
    """The graph's state. computed: the tokens each step had the model compute before it generated."""

    seed: int
    paragraphs: Annotated[list[str], operator.add]
    computed: Annotated[list[int], operator.add]


def build(saver: KVDBSaver) -> Any:
    """The graph: one node that writes a paragraph, until there are enough."""

    def write(story: Story, config: RunnableConfig) -> dict[str, Any]:
        with saver.session(config) as session:
            prompt = session.extend("\n\n") if story["paragraphs"] else session.prefill(OPENING)
            reply = session.generate(24, temperature=0.8, seed=story["seed"])
        return {"paragraphs": [reply.text], "computed": [prompt.computed]}

    graph = StateGraph(Story)
    graph.add_node("write", write)
    graph.add_edge(START, "write")
    graph.add_conditional_edges("write", lambda story: END if len(story["paragraphs"]) >= STEPS else "write")
    return graph.compile(checkpointer=saver)


def main(url: str) -> None:
    """Write a story, go back two paragraphs, write another end."""
    client = kvdb.Client.from_url(url)
    saver = KVDBSaver(client)
    saver.delete_thread("story")
    app = build(saver)
    config: RunnableConfig = {"configurable": {"thread_id": "story"}}

    first = app.invoke({"seed": 1, "paragraphs": [], "computed": []}, config)
    print("first branch:", *first["paragraphs"], sep="\n  - ")

    # The history is newest first: [0] has all paragraphs, [2] has two less.
    past = list(app.get_state_history(config))[2]
    branch = app.update_state(past.config, {"seed": 2})
    second = app.invoke(None, branch)
    print("second branch:", *second["paragraphs"], sep="\n  - ")
    print("prompt tokens computed at each step:", second["computed"])

    key = saver.state_key(app.get_state(branch).config)
    assert key is not None
    info = client.snapinfo(key)
    print(f"state of the branching point: {info.tokens} tokens, {info.bytes_own} bytes of its own")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "kvdb://127.0.0.1:6374")
