"""Follow a server as a page does."""

import json

import websocket


def listen(server, graph, **extra_data):
    """Queue a graph and yield what the server tells a page that follows it, until it ends."""
    ws = websocket.create_connection(f"ws://127.0.0.1:{server.port}/ws?clientId=listener", timeout=60)
    prompt_id = server.queue(graph, client_id="listener", extra_data=extra_data)
    try:
        while True:
            message = ws.recv()
            if isinstance(message, bytes):
                yield "preview", message
                continue
            event = json.loads(message)
            yield event["type"], event["data"]
            ended = event["type"] in ("execution_success", "execution_error", "execution_interrupted")
            if ended and event["data"]["prompt_id"] == prompt_id:
                return
    finally:
        ws.close()
