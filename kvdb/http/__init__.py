"""The HTTP gateway: OpenAI's and Anthropic's APIs over the daemon's sessions, in the daemon's own process.

    ask.py         what a request asks for, whatever its dialect; the events of an answer
    chat_api.py    /v1/chat/completions and /v1/models      text_api.py       /v1/completions
    responses_api.py  /v1/responses                         messages_api.py   /v1/messages
    turn.py        carries an ask out: prompt, prefill, branches, decoding, anchors
    prompt.py      the prompt's token ids: where a stateless client's text becomes the timeline that was sampled
    memory.py      what is remembered between requests: anchors, tool blocks, idle sessions, stored responses
    reader.py      sampled tokens -> text, reasoning, tool calls, with stop strings cut
    access.py      keys -> users and what they may do           errors.py    errors in each dialect's shape
    sse.py         answers as they come: server-sent events, keep-alive, clients that go away
    gateway.py     routes, and the server on the daemon's event loop

Imported only when `http-port` is set, since Starlette and uvicorn are an extra.
"""
