"""Questions put to a running server by the official OpenAI client, as an application would."""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from subprocess import Popen
from typing import Any

from openai import OpenAI

from pipelines.report.contents import Picture, Reply


def wait_until_healthy(server: Popen, address: str, patience_s: float) -> None:
    """Return once `GET address/health` answers with 200.

    Raises:
        OSError: where the server ends before that, or is not there in time.
    """
    deadline = time.monotonic() + patience_s
    while not _is_healthy(address):
        if server.poll() is not None:
            raise OSError(f"the server ended with status {server.returncode} before it answered at {address}/health")
        if time.monotonic() > deadline:
            raise OSError(f"no answer at {address}/health within {patience_s:g} s")
        time.sleep(0.2)


def converse(client: OpenAI, model: str, row: Mapping[str, Any], images: Path) -> Picture:
    """Ask the questions of one LLaVA row in one conversation that grows by the model's own answers.

    It ends early where the model says nothing.
    """
    data = (images / row["image"]).read_bytes()
    picture = {"url": f"data:image/jpeg;base64,{base64.b64encode(data).decode('ascii')}"}
    turns = row["conversations"]
    messages: list[Any] = []
    replies = []
    for turn, question_type in enumerate(row["question_types"]):
        question, truth = turns[2 * turn]["value"].removeprefix("<image>\n"), turns[2 * turn + 1]["value"]
        text = {"type": "text", "text": question}
        content = [{"type": "image_url", "image_url": picture}, text] if turn == 0 else [text]
        messages.append({"role": "user", "content": content})
        answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=16)
        said = answer.choices[0].message.content or ""
        replies.append(Reply(question, said, truth, said.strip() == truth, question_type))
        if not said.strip():
            break  # a turn without an answer is no conversation that could go on
        messages.append({"role": "assistant", "content": said})
    return Picture(row["id"], data, replies)


def write_conversations(path: Path, pictures: Sequence[Picture]) -> None:
    """Keep what was asked and said as JSON, without the pictures themselves."""
    kept = [{"name": picture.name, "replies": [asdict(reply) for reply in picture.replies]} for picture in pictures]
    path.write_text(json.dumps(kept, indent=1), "utf-8")


def read_conversations(path: Path, images: Path) -> list[Picture]:
    """What `write_conversations` kept, with the pictures from the folder `images`."""
    kept = json.loads(path.read_text("utf-8"))
    return [
        Picture(
            each["name"], (images / f"{each['name']}.jpg").read_bytes(), [Reply(**reply) for reply in each["replies"]]
        )
        for each in kept
    ]


def _is_healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False  # not listening yet, or still loading
