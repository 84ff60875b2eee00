"""What an operator looks at: rules, alerts, dashboards, and how Prometheus finds the server."""
