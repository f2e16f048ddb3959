"""llama-server with speculation: the log-probability of each token of a step that verifies a draft is reported as 0.

python llama_server_logprobs.py URL_WITH_SPECULATION URL_WITHOUT

Both servers continue the same prompt greedily and are asked for log-probabilities (`n_probs`). The tokens are the same.
In llama.cpp's `tools/server/server-context.cpp` the probability of such a token is set to 1 and marked "set later", but
is not set. Needs the standard library only.
"""

import json
import sys
from urllib.request import Request, urlopen

QUESTION = {
    "prompt": "The numbers are 1, 2, 3, 4, 5, 6, 7, 8,",
    "n_predict": 12,
    "temperature": 0,
    "n_probs": 1,
    "cache_prompt": False,
}
for name, url in zip(("with speculation   ", "without speculation"), sys.argv[1:3], strict=True):
    request = Request(f"{url}/completion", json.dumps(QUESTION).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=600) as reply:
        answer = json.load(reply)
    found = [(each["token"], round(each["logprob"], 3)) for each in answer["completion_probabilities"]]
    print(
        name,
        "accepted",
        answer["timings"].get("draft_n_accepted", 0),
        *(f"{token!r} {value:g}" for token, value in found),
    )
