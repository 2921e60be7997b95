"""The only room that knows Ray: roles as actors and handles. It forwards, never decides."""
