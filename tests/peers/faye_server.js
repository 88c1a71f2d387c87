'use strict';

// Bayeux over websocket and long-polling, by faye. Faye has no acknowledgement extension: what it wrote to a
// socket that is gone is lost. Its errors are numbered otherwise than CometD's: an unknown client is
// "401:<id>:Unknown client", and its 402 is a missing parameter.
//
// Only messages can be altered here (rule `reply`); connections are cut by `drop`, or by the proxy.
//
//   node faye_server.js [--port 0] [--timeout MS] [--interval MS] [--keep-alive MS] [--path /cometd]

const faye = require('faye');
const { Rules, Watch, flags, publisher, serve } = require('./harness');

const args = flags({ port: 0, timeout: 30_000, interval: 0, 'keep-alive': 30_000, path: '/cometd' });
const bayeux = new faye.NodeAdapter({
    mount: args.path,
    timeout: args.timeout / 1000,
    engine: { interval: args.interval / 1000 },
});
const engine = bayeux._server._engine; // publishing through faye's own client takes eight times as long
const memory = engine._engine;
const rules = new Rules();
const watch = new Watch();
const sessions = new Map();
let denied = false;
let refused = [];

bayeux.on('handshake', (id) => sessions.set(id, { subscriptions: new Set() }));
bayeux.on('disconnect', (id) => sessions.delete(id));
bayeux.on('subscribe', (id, channel) => sessions.get(id)?.subscriptions.add(channel));
bayeux.on('unsubscribe', (id, channel) => sessions.get(id)?.subscriptions.delete(channel));

bayeux.addExtension({
    incoming: (message, request, callback) => {
        watch.message(message, request);
        if (message.channel === '/meta/handshake' && denied) {
            message.error = '403::handshake_denied';
        }
        const wanted = message.channel === '/meta/subscribe' ? [].concat(message.subscription) : [];
        if (wanted.some((name) => refused.includes(name))) {
            message.error = '403::subscribe_denied';
        }
        callback(message);
    },
    outgoing: (message, request, callback) => {
        if (message.channel?.startsWith('/meta/')) {
            const rule = rules.take(({ kind }) => kind === 'reply', message);
            Object.assign(message, rule?.set);
        }
        callback(message);
    },
});

function send(channel, text, session) {
    const message = { channel, data: JSON.parse(text) };
    if (session === undefined) {
        engine.publish(message);
        return;
    }
    if (!sessions.has(session)) {
        throw new Error(`no session ${session}`);
    }
    if (!memory._messages.has(session)) {
        memory._messages.set(session, []);
    }
    memory._messages.get(session).push(message);
    memory.emptyQueue(session);
}

/** Loses sessions: "disconnect" closes their connections too; "silent" is noticed at the next connect. */
function forget({ session, how = 'silent' }) {
    const lost = session === undefined ? [...sessions.keys()] : [session];
    for (const id of lost) {
        if (how === 'disconnect') {
            engine.destroyClient(id);
            continue;
        }
        for (const channel of sessions.get(id)?.subscriptions ?? []) {
            memory.unsubscribe(id, channel);
        }
        memory.removeTimeout(id);
        memory._namespace.release(id);
        memory._messages.delete(id);
        sessions.delete(id);
        if (how === 'wake') {
            engine.connection(id, false)?.flush();
        }
    }
    return { sessions: lost };
}

serve({
    port: args.port,
    keepAlive: args['keep-alive'],
    handle: (request, response) => bayeux.handle(request, response),
    upgrade: (request, socket, head) => bayeux.handleUpgrade(request, socket, head),
    watch,
    rules,
    operations: () => ({
        publish: publisher(watch, send, (burst) => burst()),
        forget,
        policy: ({ handshake = true, refuse = [] }) => {
            denied = !handshake;
            refused = refuse;
        },
        sessions: () => ({
            sessions: [...sessions].map(([id, { subscriptions }]) => ({ id, subscriptions: [...subscriptions] })),
        }),
    }),
});
