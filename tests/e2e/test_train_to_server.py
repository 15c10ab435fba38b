"""From examples to a served answer: train with --upload to a running server, then score it there with --url."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support.real_server import RealServer

NAME = "weather"


def conversation(number: int) -> str:
    place = f"{'north' if number % 2 else 'south'} {number}"
    messages = [
        {"role": "user", "content": f"Weather in the {place}?"},
        {"role": "assistant", "content": "snow" if number % 2 else "sun"},
    ]
    return json.dumps({"messages": messages})


def written(path: Path, numbers: range) -> Path:
    path.write_text("\n".join(map(conversation, numbers)) + "\n", encoding="utf-8")
    return path


def loramux(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loramux_server", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)


def test_what_is_trained_is_uploaded_replayed_and_scored_on_the_running_server(
    server: RealServer, tmp_path: Path
) -> None:
    data = written(tmp_path / "train.jsonl", range(16))
    run = tmp_path / "run"
    recipe = ["--max-steps", "8", "--batch-size", "8", "--epochs", "4", "--learning-rate", "0.002"]

    trained = loramux("train", "--data", str(data), "--name", NAME, "--out", str(run), *recipe, "--upload", server.url)
    assert trained.returncode == 0, trained.stderr + trained.stdout
    record = server.adapters()[NAME]
    assert (record["fingerprint"], record["base_verified"]) == ("exact", True)

    held = written(tmp_path / "held.jsonl", range(100, 112))
    scored = loramux(
        *("eval", "--data", str(held), "--adapter", NAME, "--url", server.url),
        *("--labels", "snow,sun", "--out", str(tmp_path / "scores")),
    )
    assert scored.returncode == 0, scored.stderr + scored.stdout
    evaluation = json.loads((tmp_path / "scores" / "evaluation.json").read_text(encoding="utf-8"))
    assert "bare base" in json.dumps(evaluation)
    with server.client() as client:
        body = {"model": NAME, "messages": [{"role": "user", "content": "Weather in the north 101?"}], "max_tokens": 4}
        reply = client.post("/v1/chat/completions", json=body | {"temperature": 0}).json()
        client.delete(f"/v1/adapters/{NAME}")
    assert reply["choices"][0]["message"]["content"] in ("snow", "sun")
