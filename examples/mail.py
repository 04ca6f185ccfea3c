"""An agent that puts mails into a folder, where a mail server would take them from."""

import os
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from opscore import Context, agent


@agent("write-mail", capabilities=["mail"])
def write_mail(parameters: dict[str, Any], context: Context) -> dict[str, Any]:
    """Write a mail `to` somebody, with `subject` and `text`, into `folder`. Answers `{to, file}`.

    File and Message-ID bear the idempotency key: a second attempt replaces the mail of the first,
    and a server that got both can tell.
    """
    mail = EmailMessage()
    mail["To"] = parameters["to"]
    mail["Subject"] = " ".join(parameters["subject"].split())
    mail["Message-ID"] = f"<{context.idempotency_key}@opscore.invalid>"
    mail.set_content(parameters["text"], cte="8bit")
    folder = Path(parameters["folder"]).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{context.idempotency_key}.eml"
    draft = folder / f".{file.name}.{os.getpid()}"
    draft.write_bytes(bytes(mail))
    draft.replace(file)
    context.log("written", file=str(file))
    return {"to": parameters["to"], "file": str(file)}
