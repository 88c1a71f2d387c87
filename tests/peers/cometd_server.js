'use strict';

// CometD over HTTP, by the CometD project's own server for Node (cometd-nodejs-server): long-polling, and the
// acknowledgement extension. Sessions, queues, cookies, advice, expiry and redelivery are the server's; this
// file only starts it, publishes, and lets things go wrong round it.
//
// Things go wrong at four places, in the order in which a request passes them:
//   socket     `half_open`: what arrives is ignored and what leaves is swallowed, as by a network that is gone
//   request    rules `status` and `cut` at "request": the server never sees the request
//   message    rule `reply`: fields of a /meta reply are replaced, through the server's extension point
//   reply      rules `delay`, `cut`, `insert`, `body`, `truncate`: the server believes that it has answered
//
//   node cometd_server.js [--port 0] [--ack on|off] [--timeout MS] [--interval MS] [--max-interval MS]
//                         [--sweep MS] [--keep-alive MS] [--max-sessions-per-browser N]

const cometdServer = require('cometd-nodejs-server');
const { AcknowledgedMessagesExtension } = require('cometd-nodejs-server/ack-extension');
const { Rules, Watch, flags, publisher, serve } = require('./harness');

const args = flags({
    port: 0,
    ack: true,
    timeout: 30_000,
    interval: 0,
    'max-interval': 10_000,
    sweep: 997,
    'keep-alive': 30_000, // GWS's sample jetty.idleTimeout; Node's own 5 s would close the second connection early
    'max-sessions-per-browser': 1,
});

const cometd = cometdServer.createCometDServer({
    timeout: args.timeout,
    interval: args.interval,
    maxInterval: args['max-interval'],
    sweepPeriod: args.sweep,
    maxSessionsPerBrowser: args['max-sessions-per-browser'],
});
const rules = new Rules();
const watch = new Watch();
const sessions = new Map(); // id → what we noted of it; the session itself is the server's
const removed = { expired: 0, gone: 0, channels: 0 };
const muted = new WeakSet();
let muteNew = false;
let required = {};

/** Data that goes out as this exact text, also where it is no JSON. */
class Exact {
    constructor(text) {
        this.text = text;
    }

    toJSON() {
        return JSON.parse(this.text);
    }
}

// The server caches a message's JSON in `_json`; setting it first keeps the text exact, and a burst cheap.
function exactly(message) {
    const json = `{"channel":${JSON.stringify(message.channel)},"data":${message.data.text}}`;
    Object.defineProperty(message, '_json', { value: json });
}

cometd.addListener('sessionAdded', (session, message) => {
    sessions.set(session.id, { session, connects: 0, acked: null, ack: args.ack && message.ext?.ack === true });
});
cometd.addListener('sessionRemoved', (session, expired) => {
    sessions.delete(session.id);
    removed[expired ? 'expired' : 'gone'] += 1;
});

cometd.addListener('channelRemoved', () => (removed.channels += 1));

if (args.ack) {
    cometd.addExtension(new AcknowledgedMessagesExtension());
}
cometd.addExtension({
    incoming: (_cometd, session, message, callback) => {
        const noted = sessions.get(session?.id);
        if (noted && message.channel === '/meta/connect') {
            noted.connects += 1;
            noted.acked = message.ext?.ack ?? noted.acked;
        }
        callback(undefined, true);
    },
    outgoing: (_cometd, _sender, session, message, callback) => {
        if (message.data instanceof Exact) {
            exactly(message);
        } else if (message.channel.startsWith('/meta/')) {
            const about = { channel: message.channel, clientId: session?.id };
            Object.assign(message, rules.take((rule) => rule.kind === 'reply', about)?.set);
        }
        callback(undefined, true);
    },
});

// ── One request ──────────────────────────────────────────────────────────────────────────────────────

/** Ends a connection as a rule says: "close" (FIN), "reset" (RST), or "silent", which keeps it and says no more. */
function endConnection(response, how) {
    const socket = response.socket;
    if (how === 'silent') {
        response.emit('finish'); // to the server, bytes that the network lost are bytes sent
        return;
    }
    if (how === 'reset') {
        setImmediate(() => socket?.resetAndDestroy()); // what was written has left by then
    } else {
        socket?.destroySoon();
    }
    // Node reports no failure for a reply whose socket we destroy, and the server would then never start the
    // clock that expires the session.
    if (response.listenerCount('error') > 0) {
        response.emit('error', new Error('cut'));
    }
}

const ALTER = {
    insert: (rule, content) => `[${rule.text}${content === '[]' ? '' : ','}${content.slice(1)}`,
    truncate: (rule, content) => content.slice(0, rule.bytes ?? content.length >> 1),
    body: (rule) => rule.text,
};

const atRequest = ({ kind, at }) => kind === 'status' || (kind === 'cut' && at === 'request');
const atReply = ({ kind, at }) => kind in ALTER || kind === 'delay' || (kind === 'cut' && at !== 'request');

function cutReply(rule, response, content) {
    const bytes = Buffer.from(content, 'utf8');
    if (rule.at !== 'headers') {
        response.writeHead(response.statusCode, { 'Content-Length': bytes.length });
        response.flushHeaders();
    }
    if (rule.at === 'body') {
        response.write(bytes.subarray(0, rule.bytes ?? bytes.length >> 1));
    }
    endConnection(response, rule.how ?? 'close');
}

/** Puts our rules between the server's answer and the wire. */
function interceptReply(response, first) {
    const end = response.end.bind(response);
    response.end = (content = '') => {
        if (response.socket && muted.has(response.socket)) {
            endConnection(response, 'silent');
            return;
        }
        const rule = rules.take(atReply, first);
        if (rule?.kind === 'delay') {
            setTimeout(() => end(content, 'utf8'), rule.ms);
        } else if (rule?.kind === 'cut') {
            cutReply(rule, response, content);
        } else {
            end(rule ? ALTER[rule.kind](rule, content) : content, 'utf8');
        }
    };
}

function refuse(response, { code, headers = {}, text = '' }) {
    response.writeHead(code, headers);
    response.end(text);
}

function admit(request, response, messages) {
    const first = messages[0] ?? {};
    for (const message of messages) {
        watch.message(message, request);
    }
    const lacking = Object.keys(required).find((name) => request.headers[name.toLowerCase()] !== required[name]);
    const rule = rules.take(atRequest, first);
    if (rule?.kind === 'status') {
        refuse(response, rule);
    } else if (rule) {
        endConnection(response, rule.how ?? 'close');
    } else if (lacking !== undefined) {
        refuse(response, { code: 403, text: `Missing or invalid ${lacking}` });
    } else {
        interceptReply(response, first);
        request.body = messages; // the server takes a parsed body, as behind a body-parsing framework
        cometd.handle(request, response);
    }
}

function handle(request, response) {
    if (muteNew) {
        muted.add(request.socket);
    }
    if (muted.has(request.socket)) {
        request.resume();
        return;
    }
    if (request.method !== 'POST') {
        cometd.handle(request, response);
        return;
    }
    const chunks = [];
    request.on('data', (chunk) => chunks.push(chunk));
    request.on('end', () => {
        let messages;
        try {
            messages = JSON.parse(Buffer.concat(chunks).toString('utf8'));
        } catch {
            refuse(response, { code: 400 });
            return;
        }
        admit(request, response, Array.isArray(messages) ? messages : [messages]);
    });
}

// ── What a test may ask ──────────────────────────────────────────────────────────────────────────────

function chosen(id) {
    if (id === undefined) {
        return [...sessions.values()].map(({ session }) => session);
    }
    const noted = sessions.get(id);
    if (!noted) {
        throw new Error(`no session ${id}`);
    }
    return [noted.session];
}

function send(channel, text, id) {
    if (id === undefined) {
        // By name, each time: the server sweeps away a channel without subscribers, and the next subscription
        // makes another object of the same name; one that we had kept would publish to nobody.
        cometd.createServerChannel(channel).publish(null, new Exact(text));
    } else {
        chosen(id)[0].deliver(null, channel, new Exact(text));
    }
}

/** Runs `burst` so that each session gets all of it in one reply, rather than one message and then the rest. */
function whole(burst) {
    chosen().reduce((inner, session) => () => session.batch(inner), burst)();
}

/** Loses sessions: "silent" until the next connect, "wake" ends a held connect first, "disconnect" says so. */
function forget({ session: id, how = 'silent' }) {
    const lost = chosen(id);
    for (const session of lost) {
        if (how === 'disconnect') {
            session.disconnect();
        } else {
            cometd._removeServerSession(session, false);
            if (how === 'wake') {
                session._flush();
            }
        }
    }
    return { sessions: lost.map((session) => session.id) };
}

function policy({ handshake = true, refuse: refused = [], headers = {} }) {
    required = headers;
    cometd.policy = {
        canHandshake: (_session, _message, callback) => callback(undefined, handshake),
        canSubscribe: (_session, _message, channel, callback) => callback(undefined, !refused.includes(channel.name)),
    };
}

serve({
    port: args.port,
    keepAlive: args['keep-alive'],
    handle,
    watch,
    rules,
    operations: ({ sockets }) => ({
        publish: publisher(watch, send, whole),
        forget,
        policy,
        options: (options) => void Object.assign(cometd.options, options),
        half_open: ({ scope = 'existing' }) => {
            muteNew = scope === 'all';
            if (scope !== 'none') {
                sockets.forEach((socket) => muted.add(socket));
            }
        },
        sessions: () => ({
            sessions: [...sessions].map(([id, { session, connects, acked, ack }]) => ({
                id,
                ack,
                acked,
                connects,
                held: session._scheduler !== null,
                subscriptions: session.subscriptions.map((channel) => channel.name),
            })),
            removed,
        }),
    }),
});
