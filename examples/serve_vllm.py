"""Serve a compressed model with vLLM and ask it with an OpenAI client.

    pip install vllm openai
    python examples/serve_vllm.py --model runs/small/checkpoint --image cat.png
    python examples/serve_vllm.py --url http://localhost:8000/v1    # a server that runs already

Options that are not listed below go to `vllm serve`, such as --max-model-len 2048.
"""

import argparse
import base64
import shutil
import subprocess
import sys
import time
from pathlib import Path

import openai

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="demo", help="folder of a checkpoint, or demo")
parser.add_argument("--url", help="a server that runs already; any that speaks OpenAI's protocol")
parser.add_argument("--image", type=Path, help="a picture to ask about, PNG or JPEG")
parser.add_argument("--question", default="What is a llama?")
parser.add_argument("--port", type=int, default=8000)
parser.add_argument("--short", action="store_true", help="short replies")
options, for_vllm = parser.parse_known_args()

server = None
if options.url is None:
    if shutil.which("vllm") is None:
        sys.exit("vllm is not installed: pip install vllm, or give --url")
    folder = options.model
    if folder == "demo":
        from slimvlm.demo.build import build_demo

        folder = str(build_demo())
    # A checkpoint of slimvlm is an ordinary one: vLLM needs nothing but its folder.
    command = ["vllm", "serve", folder, "--port", str(options.port), *for_vllm]
    print("$", *command, flush=True)
    server = subprocess.Popen(command)

url = options.url or f"http://localhost:{options.port}/v1"
client = openai.OpenAI(base_url=url, api_key="not needed")
try:
    # Reading the weights takes a while; until then nobody answers.
    while True:
        try:
            model = client.models.list().data[0].id
            break
        except openai.APIConnectionError:
            if server is None or server.poll() is not None:
                sys.exit(f"nobody answers at {url}")
            time.sleep(2)

    content = [{"type": "text", "text": options.question}]
    if options.image is not None:
        kind = "png" if options.image.suffix == ".png" else "jpeg"
        picture = base64.b64encode(options.image.read_bytes()).decode()
        address = {"url": f"data:image/{kind};base64,{picture}"}
        content.insert(0, {"type": "image_url", "image_url": address})

    reply = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],
        max_tokens=8 if options.short else 128,
        temperature=0,
    )
    print(f"{options.question}\n{reply.choices[0].message.content}")
finally:
    if server is not None:
        server.terminate()
        server.wait()
