// The dashboard: the HTTP API with buttons. The key stays in this tab and goes nowhere else.
const $ = (id) => document.getElementById(id);
let key = "";
let cursor = null;

async function call(method, path, body) {
  const answer = await fetch(path, {
    method,
    headers: { "X-API-Key": key, "Content-Type": "application/json" },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  const document_ = await answer.json();
  if (!answer.ok) throw new Error(`${answer.status} ${document_.code}: ${document_.message}`);
  return document_;
}

function row(cells, action) {
  const line = document.createElement("tr");
  for (const cell of cells) line.insertCell().textContent = cell ?? "-";
  if (action) line.insertCell().append(action);
  return line;
}

function button(text, act) {
  const made = document.createElement("button");
  made.textContent = text;
  made.addEventListener("click", () => attempt(act));
  return made;
}

async function attempt(act) {
  $("trouble").textContent = "";
  try {
    await act();
  } catch (error) {
    $("trouble").textContent = error.message;
  }
}

async function showStats() {
  const { data } = await call("GET", "/api/stats");
  $("instance").textContent = `${data.version}, ${data.instance}`;
  const instances = Object.entries(data.instances).sort();
  $("instances").replaceChildren(
    ...instances.map(([name, one]) => row([name, one.connections, one.users, one.devices])));
  const words = (found) => Object.entries(found).map((pair) => pair.join(" ")).join(", ");
  $("redis").textContent = words(data.redis) || "off";
  $("rates").textContent = words(data.rates);
}

async function showConnections(more) {
  const after = more && cursor ? `&cursor=${encodeURIComponent(cursor)}` : "";
  const { data } = await call("GET", `/api/connections?limit=50${after}`);
  cursor = data.next;
  $("more").hidden = cursor === null;
  const rows = data.connections.map((one) => {
    const line = row(
      [one.user_id, one.device_id, one.instance, one.address, one.messages,
        one.connected_at.slice(0, 19), one.last_activity.slice(0, 19)],
      button("Cut", async () => {
        await call("DELETE", `/api/connections/${encodeURIComponent(one.id)}`);
        line.remove(); // its device may take a moment to say goodbye
        await showStats();
      }));
    return line;
  });
  if (more) $("connections").append(...rows);
  else $("connections").replaceChildren(...rows);
}

async function refresh() {
  await showStats();
  await showConnections(false);
}

async function send() {
  let message = $("message").value;
  try {
    message = JSON.parse(message);
  } catch { /* it is text */ }
  const target = $("target").value;
  const path = target === "all" ? "/api/broadcast"
    : `/api/${target}/${encodeURIComponent($("id").value)}/messages`;
  const { delivery } = await call("POST", path, { type: $("type").value, message });
  $("receipt").textContent = `written to ${delivery.written} of ${delivery.matched}`
    + (delivery.complete ? "" : " (not all instances answered)");
}

$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  attempt(async () => {
    await refresh();
    document.querySelector("main").hidden = false;
  });
});
$("send").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(send);
});
$("more").addEventListener("click", () => attempt(() => showConnections(true)));
setInterval(() => {
  if (!document.querySelector("main").hidden && !document.hidden) attempt(showStats);
}, 5000);
