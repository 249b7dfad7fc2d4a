-- Settle a record whose outcome is unknown; 0 when it is not unresolved.
-- KEYS[1] record, and the channel its watchers listen to; ARGV: format, new token, state (2 done, 0 released), ttl (ms)[, result]
local key = KEYS[1]
local found = redis.pcall('HMGET', key, 'v', 's', 'l', 'h', 'w')
if found.err then
  if string.find(found.err, 'WRONGTYPE', 1, true) then return 0 end
  return found
end
local version, lease = tonumber(found[1] or ''), tonumber(found[3] or '')
if not version or version > tonumber(ARGV[1]) or not lease then return 0 end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if found[2] ~= '3' and not (found[2] == '1' and found[4] == '1' and lease <= now) then return 0 end
if ARGV[3] == '0' then
  redis.call('DEL', key)
else
  if ARGV[5] then
    redis.call('HSET', key, 's', ARGV[3], 't', ARGV[2], 'r', ARGV[5])
  else
    redis.call('HSET', key, 's', ARGV[3], 't', ARGV[2])
    redis.call('HDEL', key, 'r')
  end
  redis.call('PEXPIRE', key, ARGV[4])
end
if found[5] == '1' then redis.pcall('PUBLISH', key, '') end
return 1
