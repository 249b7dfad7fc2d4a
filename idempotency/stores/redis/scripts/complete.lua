-- Record the end; 0 when the token is not the owner's. A finished record is not changed: the command was repeated.
-- KEYS[1] record, and the channel its watchers listen to; ARGV: format, token, state, ttl (ms)[, result]
local found = redis.pcall('HMGET', KEYS[1], 'v', 's', 't', 'w')
if found.err then
  if string.find(found.err, 'WRONGTYPE', 1, true) then return 0 end
  return found
end
local version, state = tonumber(found[1] or ''), found[2]
if found[3] ~= ARGV[2] or not version or version > tonumber(ARGV[1]) then return 0 end
if state == '2' then return 1 end
if state ~= '1' and state ~= '3' then return 0 end
-- First what needs no memory: a server whose memory is full refuses a write only to a script that has written nothing.
if ARGV[3] == '3' then redis.call('PERSIST', KEYS[1]) else redis.call('PEXPIRE', KEYS[1], ARGV[4]) end
if ARGV[5] then
  redis.call('HSET', KEYS[1], 's', ARGV[3], 'r', ARGV[5])
else
  redis.call('HSET', KEYS[1], 's', ARGV[3])
  if state == '3' then redis.call('HDEL', KEYS[1], 'r') end
end
-- A watcher that is not woken polls: a user that may not publish must still be able to complete.
if found[4] == '1' then redis.pcall('PUBLISH', KEYS[1], '') end
return 1
