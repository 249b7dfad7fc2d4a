-- Start the lease of a running record anew; 0 when the token is not the owner's.
-- KEYS[1] record; ARGV: format, token, lease (ms), lease + ttl (ms)
local found = redis.pcall('HMGET', KEYS[1], 'v', 's', 't', 'h')
if found.err then
  if string.find(found.err, 'WRONGTYPE', 1, true) then return 0 end
  return found
end
local version = tonumber(found[1] or '')
if found[3] ~= ARGV[2] or found[2] ~= '1' or not version or version > tonumber(ARGV[1]) then return 0 end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
-- First what needs no memory: a server whose memory is full refuses a write only to a script that has written nothing.
if found[4] == '1' then redis.call('PERSIST', KEYS[1]) else redis.call('PEXPIRE', KEYS[1], ARGV[4]) end
redis.call('HSET', KEYS[1], 'l', ARGV[3] == '0' and '0' or string.format('%.0f', now + ARGV[3]))
return 1
