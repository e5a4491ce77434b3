"""An existing Flask application that also serves httptrading.

Start it with one worker process and threads: gunicorn --threads 16 embed_in_existing_app:app
"""

from flask import Flask

from httptrading import Paper, create_blueprint

app = Flask(__name__)


@app.get("/")
def index():
    return "the application's own page"


paper = Paper(
    instance_id="WyLqtMhDvAnBb6a3",
    tokens=["Vt5UCW2sLBvgPXjR"],
)
app.register_blueprint(create_blueprint([paper], url_prefix="/httptrading"))
