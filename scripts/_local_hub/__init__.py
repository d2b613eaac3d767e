"""A Hub on this machine: what scripts/local_hub.py serves.

errors.py, names.py          what goes wrong, and which names may reach the disk
git_ids.py, git_patterns.py  git's object ids, and its ignore and attribute patterns
disk.py, objects.py          whole files or none; file contents by their hash
repos.py, commits.py         repositories, refs, history; a client's request made into one commit
accounts.py, signing.py      who may do what; links that carry their own permission
cards.py, views.py           model card metadata; the JSON that clients read
calls.py, *_routes.py, app.py    HTTP in and out
faults.py, log.py, wire.py   faults on demand, and a record of every request
server.py                    the socket and the process
"""
