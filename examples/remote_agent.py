"""A remote agent: a function, and what makes an agent behind HTTP of it. To try it:

    set -a; . .opscore/opscore.env; set +a      # where opscore is, its key and its secret
    python examples/remote_agent.py

Then submit a task for `summarizer` with a `text`.
"""

import os

from opscore.sdk.agent_server import AgentServer

server = AgentServer("summarizer", capabilities=["summarize"], capacity=4)


@server.agent
def summarize(parameters, context):
    context.log("summarizing", characters=len(parameters["text"]))
    return {"summary": parameters["text"].split(". ")[0][:100]}


if __name__ == "__main__":
    server.run(port=int(os.environ.get("PORT", "9000")))
