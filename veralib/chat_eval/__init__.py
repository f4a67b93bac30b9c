"""Chat evaluation: a model answers questions, a judge grades the answers (the paper's Tables 4 and 13, appendix F).

`vera chat-eval answer`, `judge` and `show` are this on the command line; the files are FastChat's, with more fields.
"""

from .answers import answer_locally, answer_over_http
from .judge import judge, plan
from .questions import Question, read_answers, read_questions
from .scores import compare, read_reviews

__all__ = [
    "Question",
    "answer_locally",
    "answer_over_http",
    "compare",
    "judge",
    "plan",
    "read_answers",
    "read_questions",
    "read_reviews",
]
