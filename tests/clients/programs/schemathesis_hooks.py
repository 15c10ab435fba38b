"""What schemathesis is told about this server: how large a request may be here, and what no schema can say."""

import json
import os

import schemathesis
from schemathesis.openapi.checks import RejectedPositiveData
from schemathesis.specs.openapi.checks import positive_data_acceptance

BASE = os.environ["LORAMUX_TEST_BASE"]
MOST = 4  # tokens of a reply: what is tried is what the server takes, not how fast it writes
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens")

# A refusal of one field for its form. A request that fits the schema never gets one of these.
FORM = {"unknown_parameter", "missing_required_parameter", "unsupported_parameter"}


@schemathesis.hook
def before_call(context, case, kwargs):
    """A valid request names a model that there is, and asks for few short replies."""
    if not isinstance(case.body, dict) or case.meta is None or not case.meta.generation.mode.is_positive:
        return
    if isinstance(case.body.get("model"), str):
        case.body["model"] = BASE
    for name in LENGTHS:
        if isinstance(case.body.get(name), int) and case.body[name] > MOST:
            case.body[name] = MOST
    for name in ("prompt", "input"):
        if isinstance(case.body.get(name), list):
            del case.body[name][MOST:]
    for name in ("n", "best_of"):
        if isinstance(case.body.get(name), int) and case.body[name] > 2:
            case.body[name] = 2


@schemathesis.check
def valid_requests_are_served(context, response, case):
    """In place of `positive_data_acceptance`, which knows one thing about a request: that each field has its form.

    Fields may still not fit each other, the base's vocabulary or template, or an adapter's files may be none. Such a
    refusal says which field it is about; an adapter's says all its reasons.
    """
    try:
        positive_data_acceptance(context, response, case)
    except RejectedPositiveData:
        error = json.loads(response.content)["error"]
        if response.status_code == 422 and error["reasons"]:
            return
        if response.status_code == 400 and error["code"] not in FORM and (error["param"] or error["code"]):
            return
        raise
