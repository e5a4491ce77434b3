"""The WSGI application, for gunicorn or any other server: `wsgi:app`."""

from httptrading.app import create_app

app = create_app()
