"""Tools of MCP servers: called over their protocol, and never left behind."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from agentropy.envs.tools.env import ToolsEnv
from agentropy.envs.tools.mcp_client import MCPServer, open_server
from agentropy.envs.tools.protocol import ToolError
from agentropy.errors import UsageError

# The protocol by hand, so that a server can misbehave; the library's own server is tried below.
SERVER = """
import json, os, subprocess, sys, time

TOOLS = {
    "add": ({"a": {"type": "integer"}, "b": {"type": "integer"}}, ["a"]),
    "count": ({}, []), "fail": ({}, []), "hang": ({}, []), "die": ({}, []), "ask": ({}, []), "long": ({}, []),
}
count = 0

def send(**message):
    print(json.dumps({"jsonrpc": "2.0", **message}), flush=True)

print("a banner that does not belong here", flush=True)
for line in sys.stdin:
    message = json.loads(line)
    method, params, number = message.get("method"), message.get("params", {}), message.get("id")
    if method == "initialize":
        send(id=number, result={"protocolVersion": params["protocolVersion"], "capabilities": {}, "serverInfo": {}})
    elif method == "tools/list":
        names = list(TOOLS)
        half = names[:3] if "cursor" not in params else names[3:]
        listed = [{"name": n, "description": "do " + n, "inputSchema": {"type": "object", "properties": TOOLS[n][0],
                   "required": TOOLS[n][1]}} for n in half]
        send(id=number, result={"tools": listed, **({"nextCursor": "more"} if "cursor" not in params else {})})
    elif method == "tools/call":
        name, arguments = params["name"], params["arguments"]
        if name == "die":
            os._exit(1)
        if name == "hang":
            subprocess.Popen(["sleep", "300"])
            time.sleep(300)
        if name == "ask":
            send(id=99, method="ping")
            assert json.loads(sys.stdin.readline())["result"] == {}
            send(id=98, method="sampling/createMessage", params={})
            assert json.loads(sys.stdin.readline())["error"]["code"] == -32601
            send(method="notifications/message", params={})
        count += 1
        text = {"add": lambda: str(arguments["a"] + arguments.get("b", 1)), "count": lambda: str(count),
                "long": lambda: "y" * 3_000_000}.get(name, lambda: "fine")()
        send(id=number, result={"content": [{"type": "text", "text": text}], "isError": name == "fail"})
"""


@pytest.fixture
def command(tmp_path) -> list[str]:
    path = tmp_path / "server.py"
    path.write_text(SERVER)
    return [sys.executable, "-S", str(path)]


@pytest.fixture
def tools(command):
    made = {tool.name: tool for tool in open_server(MCPServer(command, time_limit=20))}
    yield made
    for tool in made.values():
        tool.close()


def running(marker: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if marker.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def all_gone(marker: str) -> bool:
    """Whether no such process is left, or none after the moment that a killed one takes to go."""
    deadline = time.monotonic() + 5
    while running(marker) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not running(marker)


def test_tools_are_listed_over_pages_with_their_schemas(tools):
    assert list(tools) == ["add", "count", "fail", "hang", "die", "ask", "long"]
    assert tools["add"].description == "do add" and tools["add"].schema["required"] == ["a"]


def test_calls(tools):
    assert tools["add"].call({"a": 2, "b": 3}) == "5"
    assert tools["add"].call({"a": 2}) == "3"
    assert len(tools["long"].call({})) == 3_000_000
    assert tools["ask"].call({}) == "fine"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("add", {}, "add: the argument 'a' is missing"),
        ("add", {"a": 1, "c": 2}, "add: unknown argument 'c'; expected one of a, b"),
        ("fail", {}, "fine"),
        ("die", {}, "server ended and will be started again"),
    ],
)
def test_failures_are_messages_and_the_next_call_works(tools, name, arguments, message):
    with pytest.raises(ToolError, match=message):
        tools[name].call(arguments)
    assert tools["add"].call({"a": 1}) == "2"


def test_a_call_that_hangs_is_given_up(command, tmp_path):
    server = MCPServer(command, time_limit=1.0, tools=("hang", "add"), stateful=True)
    made = {tool.name: tool for tool in open_server(server)}
    with pytest.raises(ToolError, match="no answer within 1 s"):
        made["hang"].call({})
    assert made["add"].call({"a": 1}) == "2"
    for tool in made.values():
        tool.close()
        tool.close()
    assert all_gone(str(tmp_path))


def test_environments_share_a_stateless_server_and_end_it(command, tmp_path):
    server = MCPServer(command, tools=("add",))
    envs = [ToolsEnv(tools=("calculator",), mcp=(server,)) for _ in range(3)]
    for env in envs:
        env.reset(seed=0)
        assert env.step('<add>{"a": 4}</add>')[0] == "<result>\n5\n</result>"
    assert len(running(str(tmp_path))) == 2  # the server, and the shell that guards it
    for env in envs:
        env.close()
    assert all_gone(str(tmp_path))


def test_a_stateful_server_is_new_in_every_episode_and_plays_again_for_forks(command, tmp_path):
    server = MCPServer(command, tools=("count",), stateful=True)
    env, other = (ToolsEnv(tools=("calculator",), mcp=(server,)) for _ in range(2))
    for _ in range(2):
        env.reset(seed=0)
        assert env.step("<count></count>")[0] == "<result>\n1\n</result>"
    point = env.snapshot()
    env.step("<count></count>")
    other.restore(point)
    assert other.step("<count></count>")[0] == "<result>\n2\n</result>"
    env.close()
    other.close()
    assert all_gone(str(tmp_path))


def test_nothing_outlives_a_killed_parent(command, tmp_path):
    code = textwrap.dedent(f"""
        import threading, time
        from agentropy.envs.tools.mcp_client import MCPServer, open_server
        tools = {{tool.name: tool for tool in open_server(MCPServer({command!r}))}}
        threading.Thread(target=lambda: tools["hang"].call({{}})).start()
        time.sleep(0.3)
        print("started", flush=True)
        time.sleep(60)
    """)
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "started\n"
    assert len(running(str(tmp_path))) >= 3
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert all_gone(str(tmp_path))


@pytest.mark.parametrize("command", [["/nowhere/at/all"], [sys.executable, "-c", "print('hi')"]])
def test_a_program_that_is_no_server_is_refused(command):
    with pytest.raises(UsageError, match="cannot be used"):
        open_server(MCPServer(command, time_limit=10))


def test_a_tool_that_is_not_there_is_named(command):
    with pytest.raises(UsageError, match="has no tool 'ad'; did you mean 'add'"):
        open_server(MCPServer(command, tools=("ad",)))


def test_the_servers_environment_holds_no_secrets(command, monkeypatch, tools, tmp_path):
    monkeypatch.setenv("AGENTROPY_TEST_TOKEN", "secret")
    made = open_server(MCPServer([*command, "second"], tools=("add",)))
    for pid in running("second"):
        assert b"AGENTROPY_TEST_TOKEN" not in Path(f"/proc/{pid}/environ").read_bytes()
    made[0].close()
    assert os.environ["AGENTROPY_TEST_TOKEN"] == "secret"


def test_a_server_of_the_library(tmp_path):
    pytest.importorskip("mcp.server.mcpserver")
    path = tmp_path / "power_server.py"
    path.write_text(
        "from mcp.server.mcpserver import MCPServer\nserver = MCPServer('numbers')\n"
        "@server.tool()\ndef power(base: int, exponent: int = 2) -> int:\n"
        "    '''Raise a number.'''\n    return base ** exponent\nserver.run('stdio')\n"
    )
    env = ToolsEnv(tools=("calculator",), mcp=(MCPServer([sys.executable, str(path)]),), format="json")
    assert "Raise a number." in env.instructions
    env.reset(seed=0)
    call = '{"name": "power", "arguments": {"base": 7}}'
    assert env.step(call)[0] == "<tool_response>\n49\n</tool_response>"
    env.close()
    assert all_gone(str(path))
