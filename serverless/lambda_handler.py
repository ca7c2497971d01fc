"""An AWS Lambda handler for what fits there: examining a dataset, converting and describing adapters.

In the image: `MODE=lambda`. What is written lies below /tmp, the only folder that Lambda lets be written. The event is
a job of `acestep_pipeline/jobs/schema.py`, or an API Gateway or function URL request with one as its body.
"""

import base64
import json
import os
import tempfile
import traceback

for _name, _folder in (("ACESTEP_JOBS_OUTPUT", "output"), ("ACESTEP_CACHE_DIR", "cache"), ("MPLCONFIGDIR", "cache")):
    os.environ.setdefault(_name, os.path.join(tempfile.gettempdir(), _folder))

from acestep_pipeline.errors import UsageError  # noqa: E402
from acestep_pipeline.jobs.worker import FILE_TASKS, Worker, sentence  # noqa: E402

WORKER = Worker(tasks=FILE_TASKS)


def handler(event: dict, context) -> dict:
    """Do a job and return its result; `{"status": "refused" or "failed", "error": …}` where it can't be done.

    A request over HTTP gets an HTTP answer: 200, 400 or 500.
    """
    over_http = isinstance(event, dict) and "requestContext" in event
    try:
        job = _body(event) if over_http else event
        result = WORKER.run(job, job_id=context.aws_request_id, emit=_log)
        status = 200
    except Exception as error:
        status = 400 if isinstance(error, UsageError) else 500
        result = {"status": "refused" if status == 400 else "failed", "error": sentence(error)}
        if type(error).__name__ in result["error"]:  # a defect of ours
            traceback.print_exception(error)
        _log({"event": result["status"], "error": result["error"]})
    if not over_http:
        return result
    return {"statusCode": status, "headers": {"Content-Type": "application/json"}, "body": json.dumps(result)}


def _body(event: dict) -> object:
    body = event.get("body") or ""
    try:
        return json.loads(base64.b64decode(body) if event.get("isBase64Encoded") else body)
    except ValueError:
        raise UsageError("the request's body must be a job as JSON.") from None


def _log(event: dict) -> None:
    print(json.dumps(event), flush=True)
