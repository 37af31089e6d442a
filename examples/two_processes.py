"""Send a message between two processes: one has the encoder's text, the other only the packet.

python examples/two_processes.py runs/example-wire/best
"""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from latentwire import LatentWire
from latentwire.cli import run_script

CONTEXT = "Ben owns a duck. Ben lives in Seoul. Quinn owns a cat. Quinn lives in Delhi."
QUESTION = "Where is the home of Ben?"


def send(wire: str, connection: Connection) -> None:
    """Encode the context and send its packet. Runs in the sending process."""
    packet = LatentWire.from_pretrained(wire).encode([CONTEXT]).to_bytes(bits=8)
    connection.send_bytes(packet)


def main(wire: Path, /) -> None:
    """Start the sender, receive its packet, and answer from it.

    Args:
        wire: Directory of an export.
    """
    receiving = LatentWire.from_pretrained(str(wire))  # before the sender starts
    processes = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    here, there = processes.Pipe(duplex=False)
    sender = processes.Process(target=send, args=(str(wire), there))
    sender.start()
    there.close()
    packet = here.recv_bytes()
    sender.join()
    print(f"received {len(packet)} bytes; the text has {len(CONTEXT.encode())}")
    for receiver in receiving.receivers:
        (answer,) = receiving.answer(packet, QUESTION, receiver)
        print(f"{receiver}: {answer}")


if __name__ == "__main__":
    sys.exit(run_script(main, __doc__))
